"""Steps of a run that are one task run each, such as a listing: done whole, and retried whole.

A batch is different (`tasks.batches`): a retry would redo its finished checkpoints, and would hold its thread
while it waits. Both follow the same rule and the same schedule (`ptbin.runs.retrying`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from ptbin.runs.retrying import JITTER, RETRIES, RETRY_DELAYS, is_transient
from ptbin.stores.requests import limit_requests
from tasks.live import LiveRun

__all__ = ["step", "step_task", "sure_step", "worth_retrying"]

Result = TypeVar("Result")


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: whether the failed state holds a transient error."""
    del task, task_run
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(error)


RETRIED: dict[str, Any] = {
    "retries": RETRIES,
    "retry_delay_seconds": RETRY_DELAYS,
    "retry_jitter_factor": JITTER,
    "retry_condition_fn": worth_retrying,
}


def step_task(live: LiveRun, name: str, do: Callable[[], Result], *, retried: bool) -> Task[[], Result]:
    """The task of `step`."""

    def run() -> Result:
        with limit_requests(live.requests):
            return do()

    return task(name=name, cache_policy=NO_CACHE, persist_result=False, **(RETRIED if retried else {}))(run)


def step(live: LiveRun, name: str, do: Callable[[], Result], *, retried: bool = True) -> Result:
    """Do one thing as a task run called `name`; `retried` where the error is transient."""
    live.task_runs += 1
    return step_task(live, name, do, retried=retried)()


def sure_step(live: LiveRun, name: str, do: Callable[[], None]) -> None:
    """As `step`, for what must be done: without a task run where Prefect's client fails before it is.

    What was done is not done twice, and an error of `do` itself is raised as it is.
    """
    ended: list[Exception | None] = []

    def run() -> None:
        try:
            do()
        except Exception as error:
            ended.append(error)
            raise
        ended.append(None)

    try:
        step(live, name, run)
    except Exception as error:  # noqa: BLE001 - whatever Prefect's client raises
        if not ended:
            do()
        elif (fault := ended[-1]) is not None:
            raise fault from (fault.__cause__ if fault is error else error)
