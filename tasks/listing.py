"""The plan of a run, as its tasks know it, and the task that asks what is up to date already.

Where the index of finished work does not know an output, its manifest is read, in batches; that never fails a
checkpoint, because the conversion itself meets the same problem and reports it.
"""

from __future__ import annotations

from ptbin.catalog import Job
from ptbin.catalog.plan import Plan
from ptbin.runs.outcomes import Converted, Outcome
from tasks.batches import batch_task
from tasks.live import LiveRun

__all__ = ["find_up_to_date", "plan_of"]


def plan_of(live: LiveRun) -> Plan:
    """The plan that the flow has opened."""
    assert live.plan is not None, "the flow opens a plan first"
    return live.plan


@batch_task("find up-to-date outputs")
def find_up_to_date(live: LiveRun, job: Job) -> Outcome:
    """What the manifest of a job says, for those that the index does not know; a read for each."""
    row = plan_of(live).read_finished(job)
    if row is None:
        return Outcome(job.path, "changed")
    return Outcome(job.path, "up_to_date", converted=Converted.known(row))
