"""When Prefect tries a task again: by the rule for all retries (`ptbin.runs.retrying`).

Whole-task retries (Prefect's) fit tasks that do one thing, such as a listing. A batch is different: a
retry would redo its finished checkpoints, and would hold its thread while it waits. Batches therefore
hand such checkpoints back, marked transient, and the flow runs them again later in a batch of their
own (`flows.stages`); the schedule is the same.
"""

from __future__ import annotations

from typing import Any

from ptbin.runs.retrying import is_transient

__all__ = ["worth_retrying"]


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: whether the failed state holds a transient error."""
    del task, task_run
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(error)
