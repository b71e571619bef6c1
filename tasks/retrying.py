"""When to try again: only faults of a store that says it is worth it (`StorageError.transient`).

Whole-task retries (Prefect's) fit tasks that do one thing, such as a listing. A batch is different: a
retry would redo its finished checkpoints, and would hold its thread while it waits. Batches therefore
hand such checkpoints back, marked transient, and the flow runs them again later in a batch of their
own (`flows.fanout`); the schedule is the same.
"""

from __future__ import annotations

import random
from typing import Any

from ptbin.errors import StorageError

__all__ = ["JITTER", "RETRIES", "RETRY_DELAYS", "is_transient", "retry_delay", "worth_retrying"]

RETRIES = 3
RETRY_DELAYS = [2.0, 6.0, 18.0]
"""Seconds before each retry; stores have already retried single requests when a task sees an error."""
JITTER = 0.5
"""Up to this share is added, so that workers that failed together do not return together."""


def is_transient(error: BaseException) -> bool:
    return isinstance(error, StorageError) and error.transient


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: whether the failed state holds a transient error."""
    del task, task_run
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(error)


def retry_delay(retry: int) -> float:
    """Seconds to wait before retry number `retry` (from 1), with jitter."""
    return RETRY_DELAYS[min(retry, RETRIES) - 1] * (1 + JITTER * random.random())  # noqa: S311 - not a secret
