"""One checkpoint by the engine itself, for `convert` and `restore`: no Prefect, no listing, no run record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flows.cli.printing import print_lines_of_error
from flows.cli.progress import showing_progress
from flows.cli.shared_options import Shared
from flows.cli.started import began
from flows.cli.summary import single_lines
from ptbin.errors import CheckpointError, StorageError, UsageError, VerificationError

if TYPE_CHECKING:
    from ptbin.catalog import Job
    from ptbin.catalog.request import RunRequest
    from ptbin.runs.dry_run import DryRun, Look

__all__ = ["Make", "plan_one", "run_one", "single_job"]

Make = Callable[..., dict[str, Any]]
"""`ptbin.convert` or `ptbin.restore` with its options."""


def single_job(request: RunRequest, shared: Shared, *, names_one: bool) -> Job | None:
    """The job where SOURCE is one checkpoint; None where it is a place that holds some.

    `names_one`: DEST is the name of one output.

    Raises:
        UsageError: DEST names one output, and SOURCE is a place with many.
    """
    from ptbin import catalog

    dest = request.dest
    source = shared.sides.source_at(request.source)
    if names_one or not source.is_directory():
        try:
            found = catalog.find_one(source)
        except (StorageError, UsageError):
            pass  # a glob, or a folder of many: `check_call` has seen to everything else
        else:
            if names_one:
                return catalog.Job(found.uri, found.size, dest, found.path, found.certain, found.identity)
            job = request.rule.apply(found)
            if isinstance(job, catalog.Problem):
                raise UsageError(job.detail)
            return job
    if names_one:
        raise UsageError(
            f"DEST ends in {dest[dest.rindex('.') :]} and so names one output, but SOURCE is a place with "
            f"many: {request.source}; give a directory ({dest}/ if it is to have that name)"
        )
    return None


def _is_current(job: Job, request: RunRequest, shared: Shared) -> bool:
    from ptbin import catalog

    if request.distrust or request.planning.force:
        return False
    return catalog.is_up_to_date(job, request.planning, dest_options=shared.dest_options)


def plan_one(job: Job, request: RunRequest, look: Look | None, shared: Shared) -> DryRun:
    """What `run_one` would do; `look` as `ptbin.runs.dry_run.dry_run` takes it."""
    from ptbin.runs.dry_run import DryRun, plan_jobs, preview_job

    found = DryRun(request)
    if _is_current(job, request, shared):
        found.up_to_date.append(job)
    else:
        making = request.making
        plan_jobs([job], making, look or (lambda one: preview_job(one, making, shared.sides)), found)
    return found


def run_one(job: Job, request: RunRequest, make: Make, shared: Shared) -> tuple[dict[str, Any], list[str]]:
    """Summary, and lines for people."""
    from ptbin.manifests.manifest import manifest_uri
    from ptbin.runs.outcomes import Converted, Outcome, outcome_of_error
    from ptbin.runs.record import new_run_id
    from ptbin.runs.tally import Tally
    from ptbin.stores import public_uri
    from tasks.live import Settled

    tally = Tally(new_run_id(), public_uri(request.source), public_uri(request.dest), kind=request.kind)
    report: list[str] = []
    with showing_progress(shared) as listener:
        try:
            if _is_current(job, request, shared):
                tally.add_all([job], "up_to_date")
            else:
                listener.planned(1, job.source_size, 0)
                manifest = make(
                    shared.sides.source_at(job.source_uri),
                    shared.sides.dest_at(job.dest_uri),
                    run_id=tally.run_id,
                    progress=listener.moved,
                )
                facts = Converted.from_manifest(manifest, manifest_uri(job.dest_uri))
                tally.add(job, Outcome(job.path, "converted", converted=facts))
        except (CheckpointError, VerificationError, StorageError) as error:
            outcome = outcome_of_error(job.path, error)
            shown = outcome.detail
            if request.kind == "restore":
                # whole, with its lines: which keys do not fit is what the caller wants to know
                outcome = replace(outcome, detail=str(error))
                shown, *report = str(error).splitlines() or [""]
            tally.add(job, outcome)
            listener.settled(Settled(job.path, outcome.kind, job.source_size, outcome.reason, shown))
    print_lines_of_error(report)
    summary = tally.summary(time.monotonic() - began())
    return summary | {"succeeded": tally.succeeded}, single_lines(tally.entries[0], job, summary["seconds"])
