"""Work on many items in batches, each a task run: halved when lost, retried when transient.

A `Stage` says what is done; `Stages` carries it out, with one set of rules for all flows:

- A batch whose process was lost is halved and tried again, so that one item which takes its process along
  fails alone, after `LOST_TRIES`.
- Transient store errors are retried in their own batch, up to `RETRIES` times, each after a delay.
- What a stage has `staged` goes on to the next one (`write >> prove`), before batches that have not begun.
- Where a stage has a `key`, items of one key go through it in order, one batch at a time.
- Every item ends in one outcome, also where its task run failed or the run is being stopped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture

from flows.access import Running
from flows.fanout import Work, fan_out
from ptbin.runs.outcomes import Outcome, Staged, one_line
from ptbin.runs.retrying import RETRIES, retry_delay
from tasks.batches import BatchTask, path_of
from tasks.live import Ticket

LOST_TRIES = 3
"""How often a batch may lose its process before it is given up, if it is not to be halved."""

Item = TypeVar("Item")
Settle = Callable[[Sequence[tuple[Any, Outcome]]], None]


def count_of(unit: str) -> Callable[[Sequence[Any]], str]:
    """Names a batch by its size: `12 files`."""
    return lambda items: f"{len(items)} {unit}"


def _split_in_half(items: Sequence[Item]) -> list[Sequence[Item]]:
    middle = (len(items) + 1) // 2
    return [part for part in (items[:middle], items[middle:]) if part]


@dataclass(frozen=True, eq=False, slots=True)
class Stage:
    """One step of a flow, done to many items.

    Attributes:
        task: does it to a batch; `values` go with each.
        title: what task runs are called, followed by the `label` of their batch.
        settle: takes the items of a batch that have their final outcome.
        then: where staged items go; `first >> second` puts it together.
        urgent: goes before what is not: the second step of work already begun.
        splits: whether a batch whose process was lost is halved.
        key: items with the same one go through in order.
        here: whether it is done in threads of the flow's own process, whatever the runner.
    """

    task: BatchTask
    title: str
    values: Mapping[str, Any]
    settle: Settle
    label: Callable[[Sequence[Any]], str]
    then: Stage | None = None
    urgent: bool = False
    splits: bool = True
    key: Callable[[Any], str] | None = None
    here: bool = False

    def __rshift__(self, following: Stage) -> Stage:
        return replace(self, then=replace(following, urgent=True))


@dataclass(slots=True)
class _Order:
    """What goes through a stage with a key: who comes next, who is there, which keys are busy."""

    waiting: dict[str, deque[Any]] = field(default_factory=dict)
    arrived: dict[str, Staged | None] = field(default_factory=dict)
    """By path; None: it will not come, because it has its final outcome already."""
    busy: set[str] = field(default_factory=set)


class Stages:
    """The stages of one run under way."""

    def __init__(
        self,
        run: Running,
        logger: logging.Logger | logging.LoggerAdapter[Any],
        keep_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self._run = run
        self._logger = logger
        self._keep_on = keep_on
        self._order = _Order()

    def carry_out(self, *parts: tuple[Stage, Iterable[Sequence[Any]]], width: int | None = None) -> None:
        """Put batches through their stages, and through those that follow. Raises as `fan_out`."""
        self._run.live.task_runs += fan_out(
            (self._work(stage, batch) for stage, batches in parts for batch in batches),
            width=width or self._run.runner.width,
            keep_on=self._keep_on,
            stop=self._run.stop,
            check=self._run.live.check,
        )

    def expect(self, key: Callable[[Any], str], items: Iterable[Any]) -> None:
        """In which order the stage with this key takes the items, once they are staged."""
        for item in items:
            self._order.waiting.setdefault(key(item), deque()).append(item)

    def _work(self, stage: Stage, items: Sequence[Any], retry: int = 0, lost: int = 0) -> Work:
        label = stage.label(items) + (f", retry {retry}" if retry else "")

        def submit() -> PrefectFuture[Any]:
            # Prefect fills names in by `str.format`; paths may hold braces.
            name = f"{stage.title} {label}".replace("{", "{{").replace("}", "}}")
            task = stage.task.with_options(task_run_name=name)
            values = {"items": list(items), "values": dict(stage.values)}
            if stage.here:
                return self._run.runner.submit_here(task, ticket=Ticket(self._run.live.run_id), **values)
            return self._run.runner.submit(task, ticket=self._run.ticket, **values)

        def then(state: State[Any]) -> Iterable[Work]:
            if self._was_lost(stage, items, state, lost):
                self._logger.warning("%s: %s; trying again", label, state.message)
                for part in _split_in_half(items) if stage.splits else [items]:
                    yield self._work(stage, part, retry, lost + 1)
                return
            final, staged, again = [], [], []
            for item, outcome in zip(items, self._outcomes(items, state), strict=True):
                if outcome.kind == "staged" and stage.then is not None:
                    staged.append(Staged(item, outcome))
                elif outcome.transient and retry < RETRIES:
                    again.append(item)
                    self._logger.info("%s will be tried again: %s", outcome.path, outcome.detail)
                else:
                    final.append(_final(item, outcome))
            stage.settle(final)
            if again:
                yield self._work(stage, again, retry + 1)
            if stage.key is not None:
                self._order.busy -= {stage.key(item) for item, _ in final}
                self._order.busy |= {stage.key(staged.item) for staged in again}
                yield from self._next_in_order(stage)
            if stage.then is not None:
                yield from self._go_on(stage.then, staged, final)

        return Work(submit, then, stage.urgent, retry_delay(retry) if retry else 0.0)

    def _go_on(
        self, stage: Stage, staged: list[Staged], final: Sequence[tuple[Any, Outcome]]
    ) -> Iterable[Work]:
        if stage.key is not None:
            self._order.arrived |= {path_of(item): None for item, _ in final}
            self._order.arrived |= {one.path: one for one in staged}
            yield from self._next_in_order(stage)
        elif staged:
            yield self._work(stage, staged)

    def _next_in_order(self, stage: Stage) -> Iterable[Work]:
        """Of each key that is not busy, the items before which none is missing."""
        order = self._order
        ready: list[Staged] = []
        for key, waiting in order.waiting.items():
            if key in order.busy:
                continue
            while waiting and waiting[0].path in order.arrived:
                staged = order.arrived.pop(waiting.popleft().path)
                if staged is not None:
                    ready.append(staged)
                    order.busy.add(key)
        if ready:
            yield self._work(stage, ready)

    def _was_lost(self, stage: Stage, items: Sequence[Any], state: State[Any], lost: int) -> bool:
        """Whether the batch is to be tried again because the process that worked on it is gone."""
        if stage.here or not self._run.runner.is_remote or not state.is_crashed() or self._run.is_stopping:
            return False
        return lost < LOST_TRIES or (stage.splits and len(items) > 1)

    def _outcomes(self, items: Sequence[Any], state: State[Any]) -> list[Outcome]:
        if state.is_completed():
            outcomes: list[Outcome] = state.result()
            return outcomes
        if self._run.is_stopping:
            return [Outcome(path_of(item), "not_tried") for item in items]
        detail = one_line(f"the task run ended {state.name}: {state.message}")
        reason = "worker_lost" if self._run.runner.is_remote and state.is_crashed() else "internal_error"
        return [Outcome(path_of(item), "failed", reason, detail) for item in items]


def _final(item: Any, outcome: Outcome) -> tuple[Any, Outcome]:
    """The item as the flow knows it, and the seconds of all its stages."""
    if not isinstance(item, Staged):
        return item, outcome
    return item.item, replace(outcome, seconds=item.outcome.seconds + outcome.seconds)
