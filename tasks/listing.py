"""The tasks that only look: list what lies in a store, and ask what is up to date already.

A listing is one task of its own and retried whole. Where the index of finished work does not know an output,
its manifest is read, in batches; that never fails a checkpoint, because the conversion itself will meet the
same problem and report it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptbin import catalog
from ptbin.catalog import Job, OutputRule, Problem
from ptbin.catalog.companions import copied_along
from ptbin.catalog.finding import DestEntries
from ptbin.catalog.finished import read_finished
from ptbin.catalog.named import NamedFiles
from ptbin.catalog.worklist import WorkList
from ptbin.options import ConvertOptions
from ptbin.stores.limits import limit_requests
from ptbin.values.names import shown_path
from tasks.batches import batch_task, single_task
from tasks.live import LiveRun, find_live_run
from tasks.outcomes import Converted, Outcome, one_line

__all__ = [
    "discard_unfinished",
    "find_up_to_date",
    "list_checkpoints",
    "list_manifests",
    "list_mirror",
    "list_orphans",
]


@single_task("list checkpoints")
def list_checkpoints(
    run_id: str,
    source: str,
    rule: OutputRule,
    options: ConvertOptions,
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    distrust: bool = False,
    named: Sequence[str] | None = None,
    must_exist: bool = True,
    copy_links: bool = False,
) -> list[Problem]:
    """Fill the run's work list with every checkpoint below `source`; what cannot be converted at all.

    DEST is listed as well, and what its index of finished work knows is settled without a request each. With
    `distrust` nothing is taken for up to date. `named` are the paths below `source` that alone are looked at;
    where they `must_exist`, those that are not there are problems. A plan that was made before the flow
    stands.
    """
    live = find_live_run(run_id)
    if live.planned is not None:
        return live.planned
    files = NamedFiles(named) if named is not None else None
    with limit_requests(live.requests):
        problems = work_of(live).plan(
            source,
            rule,
            options,
            include=tuple(include),
            exclude=tuple(exclude),
            source_options=live.source_options,
            tick=live.tick,
            distrust=distrust,
            named=files,
            copy_links=copy_links,
        )
    return problems + (files.missing(source) if files is not None and must_exist else [])


@single_task("list both sides")
def list_mirror(
    run_id: str,
    source: str,
    rule: OutputRule,
    options: ConvertOptions,
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    distrust: bool,
    copy_links: bool = False,
) -> list[Problem]:
    """As `list_checkpoints`, with the files that go along as they are. `include` adds to these.

    With `distrust` nothing is taken for up to date by times and ETags.
    """
    live = find_live_run(run_id)
    if live.planned is not None:
        return live.planned
    with limit_requests(live.requests):
        return work_of(live).plan(
            source,
            rule,
            options,
            exclude=tuple(exclude),
            source_options=live.source_options,
            tick=live.tick,
            copies=copied_along(include),
            distrust=distrust,
            copy_links=copy_links,
        )


@single_task("discard unfinished outputs", retried=False)
def discard_unfinished(run_id: str) -> int:
    """Remove what a run that was killed left half-written in DEST; how many."""
    live = find_live_run(run_id)
    with limit_requests(live.requests):
        return work_of(live).discard_unfinished()


def work_of(live: LiveRun) -> WorkList:
    assert live.work is not None, "the flow opens a work list first"
    return live.work


@batch_task("find up-to-date outputs")
def find_up_to_date(live: LiveRun, job: Job) -> Outcome:
    """What the manifest of a job says, for those that the index does not know; a read for each."""
    work = work_of(live)
    row = read_finished(
        job,
        work.relative_manifest(job),
        work.options,
        source_options=live.source_options,
        dest_options=live.dest_options,
    )
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
