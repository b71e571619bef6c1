"""`ptbin restore`: weights back into a `.pt`, one by the engine, or a whole store through the flow."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from flows.cli.destination import one_file
from flows.cli.help import GroupedCommand, GroupedOption, PlaceType
from flows.cli.options import takes
from flows.cli.printing import align, print_json, print_line, print_lines_of_error
from flows.cli.progress import showing_progress
from flows.cli.shared_options import Shared, shared_options
from flows.cli.summary import (
    JSON_KEYS,
    conversion_lines,
    initial_lines,
    marked_row,
    single_lines,
    tell_summary,
    untold,
)
from flows.options import RESTORE, RUN, chosen
from flows.wishes import refuse_secrets, restore_options
from ptbin.errors import CheckpointError, StorageError, UsageError, VerificationError

if TYPE_CHECKING:
    from ptbin import RestoreOptions
    from ptbin.catalog import Found, Job, Problem

__all__ = ["restore_command"]

EPILOG = """\b
Examples:
  ptbin restore last.bin last.pt
  ptbin restore weights/model.safetensors model.pt
  ptbin restore last.bin module.pt --model nets:make_net --model-args '{"width": 64}' --model-path src
  ptbin restore hub/bert bert.pt --model transformers
  ptbin restore last.bin net.pt2 --model nets:make_net --as exported --example nets:inputs
  ptbin restore s3://models/weights s3://models/restored --dry-run

SOURCE is one set of weights (a file, an index of shards, a folder), and DEST a file that ends in .pt, .pth,
.ckpt, .th or .pt2; where DEST is a directory, everything below SOURCE is restored into it, through Prefect.
A file at DEST is replaced only where ptbin restored it before and it is unchanged (or with --force). With
--model the code that you name is imported, in a process of its own; nothing else is.

\b
Exit status: 0 all restored; 1 some were rejected (the report says which keys do not fit) or failed;
2 the call was wrong, nothing was written; 130 interrupted."""

ONE_OUTPUT = (".pt", ".pth", ".ckpt", ".pt2", ".th")


@click.command("restore", epilog=EPILOG, cls=GroupedCommand)
@click.argument("source", type=PlaceType())
@click.argument("dest", type=PlaceType())
@takes(RESTORE)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be done, and what would be replaced.",
    cls=GroupedOption,
    group=RUN,
)
@shared_options
def restore_command(source: str, dest: str, dry_run: bool, **values: Any) -> int:
    """Restore SOURCE, weights that were taken out of checkpoints, into DEST."""
    asked = chosen(RESTORE, values)
    shared = Shared.of(values)
    include, exclude, naming = asked["include"], asked["exclude"], asked["naming"]
    import ptbin

    names_one = _names_one(dest, asked, shared)
    options = restore_options(asked)
    ptbin.catalog.check_call(
        source,
        dest,
        source_options=shared.source_options,
        dest_options=shared.dest_options,
        writes=not dry_run,
    )
    single = _single(source, names_one, shared)
    if dry_run:
        planned = (
            [_job_of(single, dest, names_one, naming)]
            if single is not None
            else _planned(source, dest, naming, include, exclude, options, shared)
        )
        return _print_plan(planned, options, shared)
    if single is not None:
        job = _job_of(single, dest, names_one, naming)
        summary, lines = _restore_one(job, source, dest, options, shared)
    else:
        refuse_secrets(source, dest)
        from flows.cli.on_prefect import run_flow
        from flows.run_record import new_run_id

        with showing_progress(shared) as listener:
            summary = run_flow(
                "restore",
                new_run_id(),
                shared,
                listener,
                source=source,
                dest=dest,
                **asked,
            )
        lines = conversion_lines(untold(summary, listener.told))
    lines += initial_lines(summary)
    return tell_summary(summary, (*JSON_KEYS, "initial"), lines, shared)


def _names_one(dest: str, asked: dict[str, Any], shared: Shared) -> bool:
    """Whether DEST is the name of one file; where it is, its suffix settles what `--as` leaves open.

    Raises:
        UsageError: a suffix that restore does not write, or that contradicts `--as`.
    """
    suffix = one_file(dest, ONE_OUTPUT, shared.dest_options, elsewhere=(".bin", ".safetensors"))
    if suffix is None:
        return False
    if suffix == ".pt2":
        if asked["model"] is None or asked["save_as"] not in {None, "exported"}:
            raise UsageError("DEST ends in .pt2, an exported program: it needs --model, and --as exported")
        asked["save_as"] = "exported"
    return True


def _single(source: str, names_one: bool, shared: Shared) -> Found | None:
    """SOURCE if it is one set of weights and DEST one file, None if it is a place that holds some."""
    from ptbin import catalog
    from ptbin.stores import open_store

    store, path = open_store(source, shared.source_options)
    if names_one or not store.is_directory(path):
        try:
            return catalog.find_one(source, storage_options=shared.source_options)
        except (StorageError, UsageError):
            pass  # a glob, or a folder of many
    if names_one:
        raise UsageError(f"DEST names one file, but SOURCE is a place with many: {source}; give a directory")
    return None


def _job_of(found: Found, dest: str, names_one: bool, naming: Any) -> Job:
    from ptbin import catalog

    if names_one:
        return catalog.Job(found.uri, found.size, dest, found.path, found.certain, found.identity)
    jobs, problems = catalog.plan_outputs([found], dest, naming=naming, suffix=".pt")
    if problems:
        raise UsageError(problems[0].detail)
    return jobs[0]


def _planned(
    source: str,
    dest: str,
    naming: Any,
    include: Sequence[str],
    exclude: Sequence[str],
    options: RestoreOptions,
    shared: Shared,
) -> list[Job | Problem]:
    """What a run over a whole store would take on, and what its listing refuses."""
    from contextlib import closing

    from ptbin import catalog
    from ptbin.catalog.worklist import WorkList

    with closing(WorkList(dest, dest_options=shared.dest_options)) as work:
        problems = work.plan(
            source,
            catalog.OutputRule(dest, naming, ".pt"),
            options.conversion(),
            include=tuple(include),
            exclude=tuple(exclude),
            source_options=shared.source_options,
            distrust=True,
        )
        if not problems and not work.count():
            raise UsageError(f"no weights to restore below SOURCE: {source}")
        return [*sorted(work.iter_to_do(), key=lambda job: job.path), *problems]


def _print_plan(planned: Sequence[Job | Problem], options: RestoreOptions, shared: Shared) -> int:
    """What would become of each; a manifest is read for each output that is there."""
    from ptbin import catalog
    from ptbin.catalog.marks import iter_marked
    from ptbin.restoring.restore import would_replace

    problems = [item for item in planned if isinstance(item, catalog.Problem)]
    jobs = [item for item in planned if not isinstance(item, catalog.Problem)]
    current = [job for job in jobs if _is_current(job, options, shared)]
    marked = list(
        iter_marked(
            (job for job in jobs if job not in current),
            lambda job: would_replace(
                job.source_uri,
                job.dest_uri,
                options,
                source_options=shared.source_options,
                dest_options=shared.dest_options,
                standing=job.standing,
            ),
        )
    )
    problems += [item.problem for item in marked if item.problem is not None]
    marked = [item for item in marked if item.problem is None]
    if shared.as_json:
        print_json(
            {
                "dry_run": True,
                "restore": [item.to_json() for item in marked],
                "up_to_date": [job.source_uri for job in current],
                "problems": [problem.to_json() for problem in problems],
            }
        )
    else:
        rows = [("up to date", "", job.path) for job in current]
        rows += [marked_row("replace" if item.replaces else "restore", item) for item in marked]
        rows += [("refuse", problem.reason, problem.detail) for problem in problems]
        replaced = sum(1 for item in marked if item.replaces)
        counts = (
            f"would restore {len(marked)}, of them replace {replaced}, up to date {len(current)}, "
            f"refused {len(problems)}; nothing was written"
        )
        for line in [*align(rows, indent=""), "", counts]:
            print_line(line)
    return 1 if problems else 0


def _is_current(job: Job, options: RestoreOptions, shared: Shared) -> bool:
    """Whether nothing is to be done. What a model's code made is never up to date: it may have changed."""
    import ptbin

    if options.model is not None or (job.standing is not None and job.standing.size is None):
        return False
    return ptbin.catalog.is_up_to_date(job, options.conversion(), dest_options=shared.dest_options)


def _restore_one(
    job: Job, source: str, dest: str, options: Any, shared: Shared
) -> tuple[dict[str, Any], list[str]]:
    """What the flow does for many, for one, without Prefect; no run record is written."""
    import ptbin
    from flows.run_record import new_run_id
    from flows.tally import Tally
    from ptbin.manifests.manifest import manifest_uri
    from ptbin.stores import public_uri
    from tasks.live import Settled
    from tasks.outcomes import Converted, Outcome, outcome_of_error

    started = time.monotonic()
    tally = Tally(new_run_id(), public_uri(source), public_uri(dest), kind="restore")
    report: list[str] = []
    with showing_progress(shared) as listener:
        listener.planned(1, job.source_size, 0)
        try:
            if _is_current(job, options, shared):
                tally.add_all([job], "up_to_date")
            else:
                manifest = ptbin.restore(
                    job.source_uri,
                    job.dest_uri,
                    options,
                    source_options=shared.source_options,
                    dest_options=shared.dest_options,
                    run_id=tally.run_id,
                    progress=listener.moved,
                )
                facts = Converted.from_manifest(manifest, manifest_uri(job.dest_uri))
                tally.add(job, Outcome(job.path, "converted", converted=facts))
        except (CheckpointError, VerificationError, StorageError) as error:
            # whole, with its lines: which keys do not fit is what the caller wants to know
            outcome = dataclasses.replace(outcome_of_error(job.path, error), detail=str(error))
            tally.add(job, outcome)
            first, *report = str(error).splitlines() or [""]
            listener.settled(Settled(job.path, outcome.kind, job.source_size, outcome.reason, first))
    print_lines_of_error(report)
    summary = tally.summary(time.monotonic() - started)
    return summary | {"succeeded": tally.succeeded}, single_lines(tally.entries[0], job, summary["seconds"])
