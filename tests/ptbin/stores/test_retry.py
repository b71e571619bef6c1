from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from ptbin.errors import AccessDeniedError, PtbinError, SourceChangedError, StorageError
from ptbin.stores.requests import RetryPolicy, call_with_retries, call_with_retries_async

if TYPE_CHECKING:
    from collections.abc import Callable

POLICY = RetryPolicy(attempts=4, first_delay_s=0.0)


class Flaky:
    """Raises `faults` one after the other, then returns 42."""

    def __init__(self, *faults: PtbinError) -> None:
        self.faults = list(faults)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.faults:
            raise self.faults.pop(0)
        return 42

    async def later(self) -> int:
        return self()


def run_sync(flaky: Flaky) -> int:
    return call_with_retries(flaky, POLICY)


def run_async(flaky: Flaky) -> int:
    return asyncio.run(call_with_retries_async(flaky.later, POLICY))


def passing() -> StorageError:
    return StorageError("503 SlowDown", transient=True)


@pytest.mark.parametrize("run", [run_sync, run_async])
class TestBothKinds:
    def test_success_is_asked_for_once(self, run: Callable[[Flaky], int]) -> None:
        flaky = Flaky()
        assert run(flaky) == 42
        assert flaky.calls == 1

    def test_transient_faults_are_outlasted(self, run: Callable[[Flaky], int]) -> None:
        flaky = Flaky(passing(), passing(), passing())
        assert run(flaky) == 42
        assert flaky.calls == 4

    def test_attempts_are_bounded_and_the_last_fault_is_told(self, run: Callable[[Flaky], int]) -> None:
        last = StorageError("the last", transient=True)
        flaky = Flaky(passing(), passing(), passing(), last)
        with pytest.raises(StorageError, match="the last"):
            run(flaky)
        assert flaky.calls == 4

    @pytest.mark.parametrize(
        "fault", [StorageError("disk full"), AccessDeniedError("no"), SourceChangedError("other")]
    )
    def test_permanent_faults_are_raised_at_once(
        self, run: Callable[[Flaky], int], fault: PtbinError
    ) -> None:
        flaky = Flaky(fault)
        with pytest.raises(type(fault)):
            run(flaky)
        assert flaky.calls == 1


def test_delays_grow_are_bounded_and_spread() -> None:
    policy = RetryPolicy(attempts=8, first_delay_s=1.0, max_delay_s=8.0)
    for _ in range(50):
        delays = list(policy.delays_s())
        assert len(delays) == 7
        for delay, full in zip(delays, [1, 2, 4, 8, 8, 8, 8], strict=True):
            assert full / 2 <= delay <= full
    assert len({next(policy.delays_s()) for _ in range(20)}) > 10


def test_no_attempt_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        RetryPolicy(attempts=0)
