"""A request of `convert`, `restore` or `sync`: carried out, by the engine or by its flow, or only planned.

One checkpoint is for the engine itself: no Prefect, no listing, no run record.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flows.cli.command import Shared
from flows.cli.plans import print_dry_run
from flows.cli.printing import print_lines_of_error
from flows.cli.progress import showing_progress
from flows.cli.started import began
from flows.cli.summary import report_run, report_summary, single_lines
from flows.parsing import refuse_secrets
from ptbin.errors import CheckpointError, StorageError, UsageError, VerificationError

if TYPE_CHECKING:
    from ptbin.catalog import Job
    from ptbin.catalog.request import RunRequest
    from ptbin.runs.dry_run import DryRun, Look

Make = Callable[..., dict[str, Any]]
"""`ptbin.convert` or `ptbin.restore` with its options."""


def carry_out(
    request: RunRequest,
    asked: dict[str, Any],
    shared: Shared,
    *,
    names_one: bool = False,
    make: Make | None = None,
    look: Look | None = None,
) -> int:
    """Do it, or with `--dry-run` print what would be done; the exit status.

    Args:
        asked: the parameters of the flow, and `dry_run`.
        names_one: whether DEST is the name of one output.
        make: makes one output; left out, the command is for whole stores alone.
        look: what a dry run asks of each job; left out, what a conversion would do.
    """
    from flows.requests import with_named_files
    from ptbin.catalog.checks import check_request

    dry_run = asked.pop("dry_run")
    check_request(request, shared.sides, writes=not dry_run)
    single = _single_job(request, shared, names_one=names_one) if make is not None else None
    if single is not None and (asked.get("files_from"), asked.get("retry_failed")) != (None, None):
        raise UsageError(
            f"SOURCE is one file, of which --files-from and --retry-failed cannot choose: {request.source}"
        )
    if single is None:
        # Here already: a wrong call costs nothing.
        request = with_named_files(request, asked, shared.sides)
    if dry_run:
        from ptbin.catalog.plan import Plan
        from ptbin.runs.dry_run import dry_run as plan_run

        if single is not None:
            return print_dry_run(_plan_one(single, request, look, shared), shared)
        with closing(Plan(request, shared.sides)) as plan:
            return print_dry_run(plan_run(plan, look), shared)
    if single is not None:
        assert make is not None
        return report_summary(request.kind, *_run_one(single, request, make, shared), shared)
    refuse_secrets(request.source, request.dest)
    from flows.cli.on_prefect import run_prepared

    with showing_progress(shared) as listener:
        summary = run_prepared(request, shared, listener, **asked)
    return report_run(request.kind, summary, listener.reported, shared)


def _single_job(request: RunRequest, shared: Shared, *, names_one: bool) -> Job | None:
    """The job where SOURCE is one checkpoint; None where it is a place that holds some.

    Raises:
        UsageError: DEST names one output, and SOURCE is a place with many.
    """
    from ptbin import catalog

    dest = request.dest
    source = shared.sides.source_at(request.source)
    if not names_one and source.is_directory():
        return None
    try:
        found = catalog.find_one(source)
    except (StorageError, UsageError):  # a glob, or a folder of many: all else was checked before
        if not names_one:
            return None
        raise UsageError(
            f"DEST ends in {dest[dest.rindex('.') :]} and so names one output, but SOURCE is a place with "
            f"many: {request.source}; give a directory ({dest}/ if it is to have that name)"
        ) from None
    if names_one:
        return catalog.Job(found.uri, found.size, dest, found.path, found.certain, found.identity)
    job = request.rule.apply(found)
    if isinstance(job, catalog.Problem):
        raise UsageError(job.detail)
    return job


def _is_current(job: Job, request: RunRequest, shared: Shared) -> bool:
    from ptbin import catalog

    if request.distrust or request.planning.force:
        return False
    return catalog.is_up_to_date(job, request.planning, dest_options=shared.dest_options)


def _plan_one(job: Job, request: RunRequest, look: Look | None, shared: Shared) -> DryRun:
    """What `_run_one` would do."""
    from ptbin.runs.dry_run import DryRun, plan_jobs, preview_job

    found = DryRun(request)
    if _is_current(job, request, shared):
        found.up_to_date.append(job)
    else:
        making = request.making
        plan_jobs([job], making, look or (lambda one: preview_job(one, making, shared.sides)), found)
    return found


def _run_one(job: Job, request: RunRequest, make: Make, shared: Shared) -> tuple[dict[str, Any], list[str]]:
    """Summary, and lines for people."""
    from ptbin.manifests.manifest import manifest_uri
    from ptbin.runs.outcomes import Converted, Outcome, outcome_of_error
    from ptbin.runs.run_ids import new_run_id
    from ptbin.runs.tally import Tally
    from ptbin.stores import public_uri

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
            listener.settled(replace(tally.add(job, outcome), detail=shown))
    print_lines_of_error(report)
    summary = tally.summary(time.monotonic() - began())
    return summary | {"succeeded": tally.succeeded}, single_lines(tally.entries[0], job, summary["seconds"])
