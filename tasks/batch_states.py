"""How a batch's task run ends: `Completed`, with its outcomes as data, and what failed in name and message.

A refused file is not a failure of the task run that found it: the flow gets an outcome for every item. But
who opens a run in Prefect's UI looks for the task run that met the file. So the state is called `2 of 50
failed`, which is what lists of task runs show, and its message has the counts and a line for each failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from prefect.client.schemas.objects import State
from prefect.states import Completed

from ptbin.errors import short_detail
from ptbin.runs.outcomes import Outcome, one_line

__all__ = ["MAX_LINE_LENGTH", "MAX_LISTED_FAILURES", "first_failures", "state_of_batch"]

MAX_LISTED_FAILURES = 10
MAX_LINE_LENGTH = 300
FAILURES = frozenset({"rejected", "failed"})
WORDS = {"staged": "written"}
"""Kinds of outcomes that are called otherwise in pages and logs."""


def state_of_batch(outcomes: Sequence[Outcome]) -> State[list[Outcome]]:
    """The final state of the task run that came to these outcomes."""
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
