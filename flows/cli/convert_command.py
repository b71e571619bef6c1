"""`ptbin convert`: one checkpoint by the engine directly, or a whole store through the Prefect flow."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from flows.cli.destination import one_file
from flows.cli.help import GroupedOption, PlaceType
from flows.cli.listing_options import RetryingCommand, holding_list, named_paths
from flows.cli.options import takes
from flows.cli.printing import print_json, print_line
from flows.cli.progress import Problems, showing_progress
from flows.cli.shared_options import Shared, shared_options
from flows.cli.started import began
from flows.cli.summary import JSON_KEYS, conversion_lines, plan_lines, single_lines, tell_summary, untold
from flows.options import CONVERT, RUN, chosen
from flows.wishes import build_options, refuse_secrets
from ptbin.errors import StorageError, UsageError

if TYPE_CHECKING:
    from ptbin import catalog
    from ptbin.catalog import Found, Job, Problem
    from ptbin.catalog.entries import Entries
    from ptbin.options import ConvertOptions

__all__ = ["convert_command"]

EPILOG = """\b
Examples:
  ptbin convert run1/last.ckpt last.bin
  ptbin convert checkpoints/ weights/ --dry-run
  ptbin convert checkpoints/ weights/ --include 'run*/last.ckpt' --workers 4
  ptbin convert s3://models/checkpoints s3://models/weights --json > summary.json
  ptbin convert ema.pt ema.bin --select ema_state_dict --strip-prefix auto
  ptbin convert runs/step-900 model.safetensors --format safetensors --dtype bfloat16
  ptbin convert checkpoints/ hub/ --layout hf --max-shard-size 5GB
  ptbin convert in.pt s3://models/in.bin --dest-options @minio.json
  ptbin convert s3://training/runs s3://models/weights --retry-failed
  ls -t checkpoints | head | ptbin convert checkpoints/ weights/ --files-from -

SOURCE and DEST are local paths or any fsspec URL. One checkpoint goes to DEST if that ends in .bin, else
into DEST. Everything else (a directory, a prefix, a quoted glob) is converted below DEST through Prefect:
on the server of PREFECT_API_URL, or on one that is started for the run. A rerun converts only what is new
or changed.

\b
Exit status: 0 all converted or up to date; 1 some were rejected or failed;
2 the call was wrong, nothing was written; 130 interrupted."""


@click.command("convert", epilog=EPILOG, cls=RetryingCommand)
@click.argument("source", type=PlaceType())
@click.argument("dest", type=PlaceType())
@takes(CONVERT)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be done, and what would be replaced.",
    cls=GroupedOption,
    group=RUN,
)
@shared_options
def convert_command(source: str, dest: str, dry_run: bool, **values: Any) -> int:
    """Convert SOURCE, one checkpoint or a whole store of them, into DEST."""
    asked = chosen(CONVERT, values)
    shared = Shared.of(values)
    asked["files_from"] = click.get_current_context().with_resource(holding_list(asked["files_from"]))
    include, exclude, naming = asked["include"], asked["exclude"], asked["naming"]
    names_one = _names_one(dest, asked, shared)
    options = build_options(asked)
    from ptbin import catalog
    from ptbin.catalog.suffixes import OUTPUT_SUFFIXES

    catalog.check_call(
        source,
        dest,
        source_options=shared.source_options,
        dest_options=shared.dest_options,
        writes=not dry_run,
    )
    single = _single_checkpoint(source, dest, names_one, shared)
    listing = {name: asked[name] for name in ("files_from", "retry_failed")}
    if single is not None and any(value is not None for value in listing.values()):
        raise UsageError(
            f"SOURCE is one file, of which --files-from and --retry-failed cannot choose: {source}"
        )
    named = named_paths(source, dest, **listing, include=include, shared=shared) if single is None else None
    if dry_run:
        if single is not None:
            job = _job_of(single, dest, names_one, naming, options)
            current = [job] if _is_current(job, options, shared) else []
            return _print_plan([] if current else [job], current, [], options, shared)
        rule = catalog.OutputRule(dest, naming, OUTPUT_SUFFIXES[options.format], options.layout)
        to_do, current, problems, alone, entries = _planned(
            source, rule, include, exclude, options, shared, named,
            must_exist=asked["retry_failed"] is None, copy_links=asked["copy_links"],
        )  # fmt: skip
        return _print_plan(to_do, current, problems, options, shared, alone, entries)
    if single is not None:
        job = _job_of(single, dest, names_one, naming, options)
        summary, lines = _convert_one(job, source, dest, options, shared)
    else:
        refuse_secrets(source, dest)
        from flows.cli.on_prefect import run_prepared
        from flows.prepared import Asked
        from flows.run_record import new_run_id

        wanted = Asked(
            source,
            dest,
            catalog.OutputRule(dest, naming, OUTPUT_SUFFIXES[options.format], options.layout),
            options,
            tuple(include),
            tuple(exclude),
            asked["copy_links"],
            named=named,
            must_exist=asked["retry_failed"] is None,
            always=asked["force"],
            min_success=asked["min_success"],
        )
        with showing_progress(shared) as listener:
            summary = run_prepared(
                wanted,
                new_run_id(),
                shared,
                listener,
                source=source,
                dest=dest,
                **asked,
            )
        lines = conversion_lines(untold(summary, listener.told))
    return tell_summary(summary, JSON_KEYS, lines, shared)


def _names_one(dest: str, asked: dict[str, Any], shared: Shared) -> bool:
    """Whether DEST is the name of one output; where it is, its suffix settles a format that was left open.

    Raises:
        UsageError: a suffix that convert does not write, or that contradicts `--format`.
    """
    from ptbin.catalog.suffixes import OUTPUT_SUFFIXES

    suffix = one_file(dest, tuple(dict.fromkeys(OUTPUT_SUFFIXES.values())), shared.dest_options)
    if suffix is None:
        return False
    formats = [name for name, its_suffix in OUTPUT_SUFFIXES.items() if its_suffix == suffix]
    if asked["format"] not in formats:
        origin = click.get_current_context().get_parameter_source("format")
        if origin is not None and origin.name != "DEFAULT":
            raise UsageError(
                f"DEST ends in {suffix}, which --format {asked['format']} is not called: leave --format "
                "out, or name another DEST"
            )
        asked["format"] = formats[0]
    return True


def _single_checkpoint(source: str, dest: str, names_one: bool, shared: Shared) -> Found | None:
    """SOURCE if it is one object, None if it is a place that holds some."""
    from ptbin import catalog
    from ptbin.stores import open_store

    store, path = open_store(source, shared.source_options)
    if names_one or not store.is_directory(path):
        try:
            return catalog.find_one(source, storage_options=shared.source_options)
        except (StorageError, UsageError):
            pass  # a glob, or a folder of many: `check_call` has seen to everything else
    if names_one:
        raise UsageError(
            f"DEST ends in {dest[dest.rindex('.') :]} and so names one output, but SOURCE is a place with "
            f"many: {source}; give a directory ({dest}/ if it is to have that name)"
        )
    return None


def _job_of(found: Found, dest: str, names_one: bool, naming: Any, options: ConvertOptions) -> Job:
    from ptbin import catalog

    if names_one:
        return catalog.Job(found.uri, found.size, dest, found.path, found.certain, found.identity)
    jobs, problems = catalog.plan_outputs(
        [found], dest, naming=naming, format=options.format, layout=options.layout
    )
    if problems:
        raise UsageError(problems[0].detail)
    return jobs[0]


def _convert_one(
    job: Job, source: str, dest: str, options: ConvertOptions, shared: Shared
) -> tuple[dict[str, Any], list[str]]:
    """What the flow does for many, for one, without Prefect; no run record is written."""
    from flows.run_record import new_run_id
    from flows.tally import Tally
    from ptbin.stores import public_uri

    tally = Tally(new_run_id(), public_uri(source), public_uri(dest))
    with showing_progress(shared) as listener:
        if _is_current(job, options, shared):
            tally.add_all([job], "up_to_date")
        else:
            tally.add(job, _outcome_of(job, tally.run_id, options, shared, listener))
    summary = tally.summary(time.monotonic() - began())
    return summary | {"succeeded": tally.succeeded}, single_lines(tally.entries[0], job, summary["seconds"])


def _outcome_of(job: Job, run_id: str, options: ConvertOptions, shared: Shared, listener: Problems) -> Any:
    import ptbin
    from ptbin.manifests.manifest import manifest_uri
    from tasks.live import Settled
    from tasks.outcomes import Converted, Outcome, outcome_of_error

    listener.planned(1, job.source_size, 0)
    try:
        manifest = ptbin.convert(
            job.source_uri,
            job.dest_uri,
            options,
            source_options=shared.source_options,
            dest_options=shared.dest_options,
            run_id=run_id,
            progress=listener.moved,
        )
    except (ptbin.errors.CheckpointError, ptbin.errors.VerificationError, StorageError) as error:
        outcome = outcome_of_error(job.path, error)
        listener.settled(Settled(job.path, outcome.kind, job.source_size, outcome.reason, outcome.detail))
        return outcome
    return Outcome(
        job.path, "converted", converted=Converted.from_manifest(manifest, manifest_uri(job.dest_uri))
    )


def _is_current(job: Job, options: ConvertOptions, shared: Shared) -> bool:
    from ptbin import catalog

    return not options.force and catalog.is_up_to_date(job, options, dest_options=shared.dest_options)


def _planned(
    source: str,
    rule: catalog.OutputRule,
    include: Sequence[str],
    exclude: Sequence[str],
    options: ConvertOptions,
    shared: Shared,
    named: Sequence[str] | None,
    *,
    must_exist: bool,
    copy_links: bool,
) -> tuple[list[Job], list[Job], list[Problem], list[Job], Entries]:
    """What a run would convert, pass over, refuse, and (by their names) leave alone."""
    from contextlib import closing

    from ptbin.catalog.entries import nothing_below
    from ptbin.catalog.finished import read_finished
    from ptbin.catalog.named import NamedFiles
    from ptbin.catalog.worklist import WorkList
    from ptbin.sources.companions import is_companion

    files = NamedFiles(named) if named is not None else None
    with closing(WorkList(rule.dest, dest_options=shared.dest_options)) as work:
        problems = work.plan(
            source,
            rule,
            options,
            include=include,
            exclude=exclude,
            source_options=shared.source_options,
            named=files,
            copy_links=copy_links,
        )
        if files is not None and must_exist:
            problems += files.missing(source)
        if files is None and not problems and not work.count():
            raise UsageError(nothing_below(source, work.entries))
        asked = list(work.iter_to_ask())
        rows = [
            read_finished(job, work.relative_manifest(job), dest_options=shared.dest_options) for job in asked
        ]
        work.answer(asked, [row for row in rows if row is not None], options)
        by_path = operator.attrgetter("path")
        to_do = [job for job in work.iter_to_do() if not is_companion(job.path)]
        alone = [job for job in work.iter_to_do() if is_companion(job.path)] + list(work.iter_left_alone())
        current = sorted(work.iter_current(), key=by_path)
        alone.sort(key=by_path)
        return sorted(to_do, key=by_path), current, problems, alone, work.entries


def _print_plan(
    to_do: Sequence[Job],
    current: Sequence[Job],
    problems: Sequence[Problem],
    options: ConvertOptions,
    shared: Shared,
    alone: Sequence[Job] = (),
    entries: Entries | None = None,
) -> int:
    """What would become of each, with what it would replace."""
    from ptbin.catalog.marks import iter_marked, look_at_job

    sides = {"source_options": shared.source_options, "dest_options": shared.dest_options}
    marked = list(iter_marked(to_do, lambda job: look_at_job(job, options, **sides)))
    problems = [*problems, *(item.problem for item in marked if item.problem is not None)]
    marked = [item for item in marked if item.problem is None]
    skipped = dict(entries.counts) if entries is not None else {}
    if shared.as_json:
        print_json(
            {
                "dry_run": True,
                "convert": [item.to_json() for item in marked],
                "up_to_date": [job.source_uri for job in current],
                "left_alone": [job.source_uri for job in alone],
                "skipped": skipped,
                "problems": [problem.to_json() for problem in problems],
            }
        )
    else:
        for line in plan_lines(marked, current, problems, alone, skipped):
            print_line(line)
        if entries is not None and (text := entries.links_words()):
            print_line(text)
    return 1 if problems else 0
