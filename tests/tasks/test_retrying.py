"""What is tried again, and when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from prefect import Task
from prefect.states import Failed

from ptbin.errors import AccessDeniedError, CorruptArchiveError, StorageError
from ptbin.runs.retrying import JITTER, RETRIES, RETRY_DELAYS, retry_delay
from tasks.live import LiveRun
from tasks.steps import step_task, sure_step, worth_retrying


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StorageError("503 slow down", transient=True), True),
        (StorageError("no space left"), False),
        (AccessDeniedError("403"), False),
        (CorruptArchiveError("truncated"), False),
        (ConnectionError("not one of ours"), False),
        (KeyError("bug"), False),
    ],
)
def test_only_transient_errors_of_a_store_are_worth_it(error: Exception, expected: bool) -> None:
    assert worth_retrying(None, None, Failed(data=error)) is expected


def test_whole_steps_retry_by_that_rule() -> None:
    task: Task[[], list[str]] = step_task(LiveRun("run"), "list", list, retried=True)
    assert task.retry_condition_fn is worth_retrying
    assert (task.name, task.retries, task.retry_jitter_factor) == ("list", RETRIES, JITTER)
    assert step_task(LiveRun("run"), "merge", list, retried=False).retries == 0


def test_delays_grow_and_carry_jitter() -> None:
    for retry, base in enumerate(RETRY_DELAYS, start=1):
        delays = {retry_delay(retry) for _ in range(50)}
        assert len(delays) > 1
        assert all(base <= delay <= base * (1 + JITTER) for delay in delays)
    assert list(RETRY_DELAYS) == sorted(RETRY_DELAYS)
    assert len(RETRY_DELAYS) == RETRIES


class PrefectAwayError(Exception):
    """What Prefect's client may come to."""


@pytest.mark.parametrize("away", ["before", "behind", "never"])
@pytest.mark.parametrize("fault", [None, KeyError("ours"), StorageError("no space left")])
def test_what_must_be_done_is_done_once_with_prefect_away(
    monkeypatch: pytest.MonkeyPatch, away: str, fault: Exception | None
) -> None:
    def stand_in(live: LiveRun, name: str, do: Callable[[], None]) -> None:
        del live, name
        if away == "before":
            raise PrefectAwayError
        try:
            do()
        finally:
            if away == "behind":
                raise PrefectAwayError

    done = []

    def do() -> None:
        done.append(1)
        if fault is not None:
            raise fault

    monkeypatch.setattr("tasks.steps.step", stand_in)
    with pytest.raises(type(fault)) if fault is not None else contextlib.nullcontext():
        sure_step(LiveRun("run"), "write the run record", do)
    assert done == [1]
