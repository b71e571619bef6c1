"""Keep a number of task runs going until nothing is left to do.

No more runs are submitted than can work at once. So what follows from a finished batch (its proof) goes
before batches that have not begun, a run that is stopped has nothing queued, and work that has to wait
for a store to recover waits here and not in a worker's slot. Knows futures, not what they compute.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Crashed
from prefect.utilities.annotations import quote as prefect_quote

__all__ = ["Work", "fan_out", "quote"]

Value = TypeVar("Value")

DRAIN_SECONDS = 15.0
ROUND_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Work:
    """A task run that is to be: `submit` starts it, `then` gets its final state and returns what follows."""

    submit: Callable[[], PrefectFuture[Any]]
    then: Callable[[State[Any]], Iterable[Work]]
    urgent: bool = False
    """Goes before everything that is not: the second half of work already begun."""
    delay: float = 0.0
    """Seconds to wait before it may start."""


def fan_out(
    work: Iterable[Work],
    *,
    width: int,
    keep_on: Callable[[], bool] = lambda: True,
    stop: Callable[[], object] = lambda: None,
    check: Callable[[], object] = lambda: None,
) -> int:
    """Run the work and all that follows from it, `width` wide; return how many task runs that were.

    Once `keep_on` says no, only urgent work is still started. `check` is called every now and then and may
    raise. That, and whatever is raised in `then`, ends the loop: `stop` is called, which stops what is
    under way; what that comes to within `DRAIN_SECONDS` still counts; then the error is raised.
    """
    order = itertools.count()
    ready: list[tuple[bool, int, Work]] = []
    waiting: list[tuple[float, int, Work]] = []
    running: dict[PrefectFuture[Any], Work] = {}
    finished: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()
    started = 0

    def add(more: Iterable[Work]) -> None:
        for piece in more:
            if piece.delay > 0:
                heapq.heappush(waiting, (time.monotonic() + piece.delay, next(order), piece))
            else:
                heapq.heappush(ready, (not piece.urgent, next(order), piece))

    def note(done: PrefectFuture[Any]) -> None:
        finished.put(done)

    coming = iter(work)

    def next_piece() -> Work | None:
        """What follows from finished work first, then new work, taken from its source only now."""
        nonlocal coming
        while not ready:
            piece = next(coming, None)
            if piece is None:
                return None
            add([piece])
        return heapq.heappop(ready)[2]

    def go_on() -> bool:
        """One round: start what fits, handle one that ended. False: nothing is left."""
        nonlocal coming, ready, waiting, started
        check()
        while waiting and waiting[0][0] <= time.monotonic():
            piece = heapq.heappop(waiting)[2]
            heapq.heappush(ready, (not piece.urgent, next(order), piece))
        if not keep_on():
            coming = iter(())
            ready = [entry for entry in ready if entry[2].urgent]
            waiting = [entry for entry in waiting if entry[2].urgent]
            heapq.heapify(ready)
            heapq.heapify(waiting)
        while len(running) < width and (next_one := next_piece()) is not None:
            future = next_one.submit()
            started += 1
            running[future] = next_one
            future.add_done_callback(note)
        if not running and not waiting:
            return False
        timeout = ROUND_SECONDS
        if waiting and len(running) < width:
            timeout = min(timeout, max(0.0, waiting[0][0] - time.monotonic()))
        try:
            future = finished.get(timeout=timeout)
        except queue.Empty:
            return True
        add(running.pop(future).then(_final_state(future)))
        return True

    try:
        while go_on():
            pass
    except BaseException:
        stop()
        deadline = time.monotonic() + DRAIN_SECONDS
        with contextlib.suppress(queue.Empty):
            while running:
                future = finished.get(timeout=max(0.0, deadline - time.monotonic()))
                list(running.pop(future).then(_final_state(future)))  # what follows is not begun
        raise
    return started


def _final_state(future: PrefectFuture[Any]) -> State[Any]:
    """How a task run ended; one that its engine lost, with the process it was in, has crashed."""
    try:
        future.wait()
        state = future.state
    except Exception as error:  # noqa: BLE001 - each engine has its own errors for this
        return Crashed(message=f"{type(error).__name__}: {error}")
    return state if state.is_final() else Crashed(message="its worker was lost")


def quote(value: Value) -> Value:
    """Prefect's `quote`: the parameter is not walked through for futures. To mypy it stays what it is."""
    return cast("Value", prefect_quote(value))
