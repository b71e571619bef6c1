"""A batch, one job after the other: how long each took, and what is left where the run is being stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ptbin.catalog import Job
from tasks.live import Interrupted
from tasks.outcomes import Outcome

__all__ = ["FULL_AFTER", "each"]


FULL_AFTER = 3
"""After so many failures for want of room the rest of a batch is not tried, and the run ends."""


def each(jobs: Sequence[Job], do: Callable[[Job], Outcome]) -> list[Outcome]:
    """One outcome per job, in order. Where the run is stopped, that job and those after it were not tried.

    Nor are they where DEST has no room: each would be read whole to find that out once more.

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
        if sum(done.is_full for done in outcomes) >= FULL_AFTER:
            break
    return outcomes + [Outcome(job.path, "not_tried") for job in jobs[len(outcomes) :]]
