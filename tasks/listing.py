"""The tasks that only look: list what lies in a store, and ask what is up to date already.

A listing is one task of its own and retried whole. Where the index of finished work does not know an output,
its manifest is read, in batches; that never fails a checkpoint, because the conversion itself will meet the
same problem and report it.
"""

from __future__ import annotations

from ptbin import catalog
from ptbin.catalog import Job
from ptbin.catalog.finding import DestEntries
from ptbin.catalog.plan import Plan
from ptbin.stores.limits import limit_requests
from ptbin.values.names import shown_path
from tasks.batches import batch_task, single_task
from tasks.live import LiveRun, find_live_run
from tasks.outcomes import Converted, Outcome, one_line

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
    """The URI of every manifest below `dest`, and an issue for each folder that cannot be read."""
    entries = DestEntries()
    options = find_live_run(run_id).dest_options
    found = list(catalog.find_manifests(dest, storage_options=options, watch=entries))
    issues = [
        {
            "reason": error.reason,
            "uri": f"{dest.rstrip('/')}/{shown_path(path)}",
            "detail": one_line(str(error)),
        }
        for path, error in entries.problems
    ]
    return found, issues


@single_task("list orphans")
def list_orphans(run_id: str, dest: str) -> list[str]:
    """The URI of every output below `dest` that no manifest vouches for."""
    return list(catalog.find_orphans(dest, storage_options=find_live_run(run_id).dest_options))
