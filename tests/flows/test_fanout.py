"""`flows.fanout` with futures of a plain thread pool."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from flows.fanout import Work, fan_out


class Done(str):
    """The state of a plain future: its result."""

    __slots__ = ()

    def is_final(self) -> bool:
        return True


class PlainFuture:
    """As much of a Prefect future as the fan-out uses; its state is its result."""

    def __init__(self, inner: Future[Any]) -> None:
        self.inner = inner

    def add_done_callback(self, hear: Callable[[Any], None]) -> None:
        self.inner.add_done_callback(lambda _: hear(self))

    def wait(self) -> None:
        self.inner.result()

    @property
    def state(self) -> Any:
        return Done(self.inner.result())


class Pool:
    """Runs work and remembers the order and the width it saw."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(8)
        self.began: list[str] = []
        self.width = 0
        self._running = 0
        self._lock = threading.Lock()

    def work(
        self,
        name: str,
        then: Callable[[Any], Iterable[Work]] = lambda _: (),
        *,
        seconds: float = 0.005,
        urgent: bool = False,
        delay: float = 0.0,
    ) -> Work:
        def run() -> str:
            with self._lock:
                self.began.append(name)
                self._running += 1
                self.width = max(self.width, self._running)
            time.sleep(seconds)
            with self._lock:
                self._running -= 1
            return name

        def submit() -> Any:
            return PlainFuture(self.executor.submit(run))

        return Work(submit, then, urgent=urgent, delay=delay)


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.executor.shutdown()


def test_everything_runs_once_and_no_wider_than_asked(pool: Pool) -> None:
    names = [str(number) for number in range(30)]
    assert fan_out([pool.work(name) for name in names], width=3) == 30
    assert sorted(pool.began, key=int) == names
    assert pool.width == 3


def test_what_follows_from_finished_work_goes_before_work_not_begun(pool: Pool) -> None:
    def prove(state: Any) -> list[Work]:
        return [pool.work(f"prove {state}", urgent=True)]

    fan_out([pool.work(name, prove) for name in "abc"], width=1)
    assert pool.began == ["a", "prove a", "b", "prove b", "c", "prove c"]


def test_delayed_work_holds_no_slot(pool: Pool) -> None:
    began = time.monotonic()
    fan_out([pool.work("late", delay=0.2), pool.work("a"), pool.work("b")], width=1)
    assert pool.began == ["a", "b", "late"]
    assert time.monotonic() - began >= 0.2


def test_once_told_to_stop_only_urgent_work_is_started(pool: Pool) -> None:
    seen: list[str] = []

    def note(state: Any) -> list[Work]:
        seen.append(state)
        return [pool.work(f"prove {state}", urgent=True), pool.work("again", delay=0.01)]

    fan_out([pool.work(name, note) for name in "abc"], width=1, keep_on=lambda: not seen)
    assert pool.began == ["a", "prove a"]


def test_what_is_raised_while_collecting_ends_the_loop(pool: Pool) -> None:
    def fail(state: Any) -> list[Work]:
        raise ZeroDivisionError(state)

    with pytest.raises(ZeroDivisionError):
        fan_out([pool.work("a", fail), pool.work("b")], width=1)
    assert pool.began == ["a"]


def test_an_interrupt_stops_what_is_under_way_and_hears_what_it_came_to(pool: Pool) -> None:
    stopped = threading.Event()
    heard: list[str] = []

    def interrupt(_: Any) -> Iterable[Work]:
        raise KeyboardInterrupt

    def note(state: Any) -> Iterable[Work]:
        heard.append(state)
        return [pool.work("never")]

    slow = pool.work("slow", note, seconds=0.2)
    with pytest.raises(KeyboardInterrupt):
        fan_out([slow, pool.work("a", interrupt), pool.work("b")], width=2, stop=stopped.set)
    assert stopped.is_set()
    assert heard == ["slow"]
    assert "never" not in pool.began


def test_a_task_run_that_its_engine_lost_has_crashed(pool: Pool) -> None:
    class Lost(PlainFuture):
        def wait(self) -> None:
            raise OSError("the pool is broken")

    states: list[Any] = []
    begun: Any = pool.work("a").submit()

    def submit() -> Any:
        return Lost(begun.inner)

    def note(state: Any) -> Iterable[Work]:
        states.append(state)
        return ()

    lost = Work(submit, note)
    assert fan_out([lost], width=1) == 1
    assert states[0].is_crashed()
    assert "the pool is broken" in states[0].message
