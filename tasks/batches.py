"""What the tasks of batches have in common: `@batch_task`, for what is done to many.

A function below `@batch_task` works on one thing: a checkpoint, a file, a manifest. The task that it becomes
takes a batch of them and ends in a state that holds one outcome for each, in order.
It finds or joins the live run, keeps to its limit of requests, stops where the run is being stopped, takes
the time, and turns an error into an outcome, so that what is wrong with one never stops the others. It is
never retried whole: that would redo what is finished; the flow retries the rest (`flows.stages`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from ptbin.errors import short_detail
from ptbin.runs.account import FULL_AFTER
from ptbin.runs.outcomes import Outcome, one_line, outcome_of_error
from ptbin.stores.requests import limit_requests
from tasks.live import Interrupted, Ticket, enter_run

MAX_LISTED_FAILURES = 10
MAX_LINE_LENGTH = 300
FAILURES = frozenset({"rejected", "failed"})
WORDS = {"staged": "written"}
"""Kinds of outcomes that are called otherwise in pages and logs."""


class _WithPath(Protocol):
    @property
    def path(self) -> str: ...


Item = str | _WithPath
"""A job, or a path that is all there is to say."""

BatchTask = Task[[Ticket, Sequence[Any], Mapping[str, Any]], State[list[Outcome]]]


def path_of(item: Item) -> str:
    return item if isinstance(item, str) else item.path


def batch_task(
    name: str,
    *,
    opens: Callable[..., Mapping[str, Any]] | None = None,
    groups: Callable[[Any], str] | None = None,
) -> Callable[[Callable[..., Any]], BatchTask]:
    """A task named `name` of `do(live, item, **values)`, which answers with the item's outcome.

    Args:
        opens: what is opened once for a batch: (live, **values) to the values that `do` gets.
        groups: items of one group are done together: `do` gets a list of them and answers with a list.
    """

    def decorate(do: Callable[..., Any]) -> BatchTask:
        def run(ticket: Ticket, items: Sequence[Any], values: Mapping[str, Any]) -> State[list[Outcome]]:
            live = enter_run(ticket)
            found: dict[int, Outcome] = {}
            opened: Mapping[str, Any] | None = None
            for places in _parts(items, groups):
                part = [items[place] for place in places]
                began = time.monotonic()
                try:
                    live.moved(0)
                    with limit_requests(live.requests):
                        if opened is None:
                            opened = opens(live, **values) if opens is not None else values
                        done = do(live, part if groups is not None else part[0], **opened)
                    outcomes: list[Outcome] = done if groups is not None else [done]
                except Interrupted:
                    break
                except Exception as error:  # noqa: BLE001 - what is wrong with one must not stop the others
                    outcomes = [outcome_of_error(path_of(item), error) for item in part]
                seconds = (time.monotonic() - began) / len(part)
                for place, outcome in zip(places, outcomes, strict=True):
                    found[place] = replace(outcome, seconds=seconds)
                if sum(outcome.is_full for outcome in found.values()) >= FULL_AFTER:
                    break  # each of the rest would be read whole to find that out once more
            # What was finished before a stop is reported too: an interrupted run accounts for it.
            return _state_of(
                [found.get(place) or Outcome(path_of(item), "not_tried") for place, item in enumerate(items)]
            )

        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(run, attribute, getattr(do, attribute))
        return task(name=name, cache_policy=NO_CACHE, persist_result=False)(run)

    return decorate


def _parts(items: Sequence[Any], groups: Callable[[Any], str] | None) -> list[list[int]]:
    """Places in the batch of what is done together."""
    if groups is None:
        return [[place] for place in range(len(items))]
    parts: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        parts.setdefault(groups(item), []).append(place)
    return list(parts.values())


def _state_of(outcomes: Sequence[Outcome]) -> State[list[Outcome]]:
    """The final state of the task run that came to these outcomes.

    A refused file is not a failure of the task run that found it: the flow gets an outcome for each item. But
    people who open a run in Prefect's UI look for the task run that met the file. So the state is called
    `2 of 50 failed`, which lists of task runs show, and its message has a line for each failure.
    """
    failures = [outcome for outcome in outcomes if outcome.kind in FAILURES]
    name = f"{len(failures)} of {len(outcomes)} failed" if failures else "Completed"
    return Completed(name=name, message=_message(outcomes, failures), data=list(outcomes))


def _message(outcomes: Sequence[Outcome], failures: Sequence[Outcome]) -> str:
    counts = Counter(outcome.kind for outcome in outcomes)
    lines = [
        ", ".join(f"{WORDS.get(kind, kind).replace('_', ' ')} {n}" for kind, n in sorted(counts.items()))
    ]
    return "\n".join(lines + first_failures([_line(outcome) for outcome in failures]))


def first_failures(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are: messages of states are short."""
    more = len(lines) - MAX_LISTED_FAILURES
    return [*lines[:MAX_LISTED_FAILURES], *([f"and {more:,} more"] if more > 0 else [])]


def _line(outcome: Outcome) -> str:
    again = " (transient)" if outcome.transient else ""
    detail = short_detail(outcome.path, outcome.detail)
    return one_line(f"{outcome.path}: {outcome.reason}{again}: {detail}", MAX_LINE_LENGTH)
