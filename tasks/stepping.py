"""A batch, one job after the other: how long each took, and what is left where the run is being stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ptbin.catalog import Job
from tasks.live import Interrupted
from tasks.outcomes import Outcome

__all__ = ["each"]


def each(jobs: Sequence[Job], do: Callable[[Job], Outcome]) -> list[Outcome]:
    """One outcome per job, in order. Where the run is stopped, that job and those after it were not tried.

    What was finished before is told all the same: an interrupted run accounts for it.
    """
    outcomes: list[Outcome] = []
    for job in jobs:
        began = time.monotonic()
        try:
            outcome = do(job)
        except Interrupted:
            break
        outcomes.append(replace(outcome, seconds=time.monotonic() - began))
    return outcomes + [Outcome(job.path, "not_tried") for job in jobs[len(outcomes) :]]
