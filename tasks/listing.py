"""The tasks that only look: list what lies in a store, and ask what is up to date already.

A listing is one task of its own and retried whole. Where the index of finished work does not know an output,
its manifest is read, in batches; that never fails a checkpoint, because the conversion itself will meet the
same problem and report it.
"""

from __future__ import annotations

from ptbin import catalog
from ptbin.catalog import Job
from ptbin.catalog.plan import Plan
from ptbin.runs.outcomes import Converted, Outcome
from ptbin.runs.verifying import list_manifests_below
from ptbin.stores.limits import limit_requests
from tasks.batches import batch_task, single_task
from tasks.live import LiveRun, find_live_run

__all__ = [
    "discard_unfinished",
    "find_up_to_date",
    "list_manifests",
    "list_orphans",
    "make_plan",
    "plan_of",
]


@single_task("list both sides")
def make_plan(run_id: str) -> None:
    """Make the plan that the flow has opened; one that was made before the flow began stands."""
    live = find_live_run(run_id)
    with limit_requests(live.requests):
        plan_of(live).make(live.tick)


@single_task("discard unfinished outputs", retried=False)
def discard_unfinished(run_id: str) -> int:
    """Remove what a run that was killed left half-written in DEST; how many."""
    live = find_live_run(run_id)
    with limit_requests(live.requests):
        return plan_of(live).work.discard_unfinished()


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


@single_task("list manifests")
def list_manifests(run_id: str, dest: str) -> tuple[list[str], list[dict[str, str]]]:
    """As `ptbin.runs.verifying.list_manifests_below`."""
    return list_manifests_below(dest, find_live_run(run_id).dest_options)


@single_task("list orphans")
def list_orphans(run_id: str, dest: str) -> list[str]:
    """The URI of every output below `dest` that no manifest vouches for."""
    return list(catalog.find_orphans(dest, storage_options=find_live_run(run_id).dest_options))
