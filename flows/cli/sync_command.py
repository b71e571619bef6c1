"""`ptbin sync`: DEST becomes a mirror of SOURCE, through the Prefect flow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from flows.cli.destination import refuse_one_file
from flows.cli.help import GroupedCommand, GroupedOption, PlaceType
from flows.cli.options import takes
from flows.cli.printing import align, print_json, print_line
from flows.cli.progress import showing_progress
from flows.cli.shared_options import Shared, shared_options
from flows.cli.summary import JSON_KEYS, SYNC_KEYS, conversion_lines, tell_summary, untold
from flows.options import RUN, SYNC, chosen
from flows.units import format_nbytes
from flows.wishes import build_options, refuse_secrets
from ptbin.catalog.entries import skipped_words
from ptbin.errors import OutputExistsError, UsageError

if TYPE_CHECKING:
    from ptbin.options import ConvertOptions

__all__ = ["sync_command"]

EPILOG = """\b
Examples:
  ptbin sync checkpoints/ weights/ --dry-run
  ptbin sync s3://training/runs s3://models/weights
  ptbin sync runs/ mirror/ --delete --max-delete 20 --backup-dir old/2026-11-24
  ptbin sync runs/ mirror/ --include 'figures/**' --exclude 'debug/**'

Checkpoints are converted as `ptbin convert` does; beside them go their companions (configuration, tokenizer,
README, licence, *.json, *.yaml, ...) and what else --include names, as they are. A second run with nothing
changed does nothing. Nothing is deleted unless asked for, never when anything failed, and never what ptbin
did not make of SOURCE.

\b
Exit status: 0 all in step; 1 some were rejected or failed; 2 the call was wrong,
nothing was written; 130 interrupted."""


@click.command("sync", epilog=EPILOG, cls=GroupedCommand)
@click.argument("source", type=PlaceType())
@click.argument("dest", type=PlaceType())
@takes(SYNC)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print what would be done, and what would be replaced.",
    cls=GroupedOption,
    group=RUN,
)
@shared_options
def sync_command(source: str, dest: str, dry_run: bool, **values: Any) -> int:
    """Make DEST a mirror of SOURCE: checkpoints as weights, their companions as they are."""
    asked = chosen(SYNC, values)
    shared = Shared.of(values)
    options = build_options(asked, force=False)
    delete, max_delete, backup_dir = asked["delete"], asked["max_delete"], asked["backup_dir"]
    # First of all: what refuses the call otherwise may name SOURCE as it was written.
    refuse_secrets(source, dest, *([backup_dir] if backup_dir else []))
    if max_delete is not None and not delete:
        raise UsageError("--max-delete means nothing without --delete")
    refuse_one_file(dest, shared.dest_options, "sync")
    from ptbin.catalog.checks import check_mirror

    check_mirror(
        source,
        dest,
        delete=delete,
        backup_dir=backup_dir,
        source_options=shared.source_options,
        dest_options=shared.dest_options,
        writes=not dry_run,
    )
    if dry_run:
        return _print_plan(
            source, dest, asked["include"], asked["exclude"], asked["naming"], options, shared,
            delete=delete, max_delete=max_delete, checksum=asked["checksum"], immutable=asked["immutable"],
            backs_up=backup_dir is not None, force=asked["force"], copy_links=asked["copy_links"],
        )  # fmt: skip
    from flows.cli.on_prefect import run_prepared
    from flows.prepared import Asked
    from flows.run_record import new_run_id
    from ptbin.catalog import OutputRule
    from ptbin.catalog.mirroring import alone
    from ptbin.catalog.suffixes import OUTPUT_SUFFIXES

    wanted = Asked(
        source,
        dest,
        OutputRule(dest, asked["naming"], OUTPUT_SUFFIXES[options.format], options.layout),
        alone(options),
        (),
        tuple(asked["exclude"]),
        asked["copy_links"],
        tuple(asked["include"]),
        deletes=delete,
        distrust=asked["checksum"],
        always=asked["checksum"],
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
    return tell_summary(
        summary, (*JSON_KEYS, *SYNC_KEYS), conversion_lines(untold(summary, listener.told)), shared
    )


def _print_plan(
    source: str,
    dest: str,
    include: Sequence[str],
    exclude: Sequence[str],
    naming: Any,
    options: ConvertOptions,
    shared: Shared,
    *,
    delete: bool,
    max_delete: int | None,
    checksum: bool,
    immutable: bool,
    backs_up: bool,
    force: bool,
    copy_links: bool,
) -> int:
    """What a run would do, found as a run finds it; nothing is written, not even a lease."""
    from ptbin.catalog import OutputRule
    from ptbin.catalog.companions import copied_along
    from ptbin.catalog.entries import nothing_below
    from ptbin.catalog.finished import read_finished
    from ptbin.catalog.marks import iter_marked, look_at_job
    from ptbin.catalog.mirroring import alone, excess, iter_gone
    from ptbin.catalog.suffixes import OUTPUT_SUFFIXES
    from ptbin.catalog.worklist import WorkList
    from ptbin.sources.companions import is_companion

    rule = OutputRule(dest, naming, OUTPUT_SUFFIXES[options.format], options.layout)
    options = alone(options)
    with closing(WorkList(dest, dest_options=shared.dest_options)) as work:
        problems = work.plan(
            source,
            rule,
            options,
            exclude=exclude,
            source_options=shared.source_options,
            copies=copied_along(include),
            copy_links=copy_links,
        )
        if not problems and not work.count():
            raise UsageError(nothing_below(source, work.entries, "nothing to mirror"))
        asked = list(work.iter_to_ask())
        rows = [
            read_finished(
                job,
                work.relative_manifest(job),
                options,
                source_options=shared.source_options,
                dest_options=shared.dest_options,
            )
            for job in asked
        ]
        work.answer(asked, [row for row in rows if row is not None], options)
        if immutable:
            for job in list(work.iter_to_do()):
                if work.is_only_unproven(job):
                    work.settle_current(job)
        to_do = sorted(work.iter_to_do(), key=lambda job: job.path)
        left = [job for job in to_do if not job.copies and is_companion(job.path)]
        jobs = [job for job in to_do if job not in left]
        left += work.iter_left_alone()
        changed = {job.dest_uri: work.present(job) for job in jobs}
        found = []
        if delete:
            found = list(
                iter_gone(
                    work,
                    source,
                    exclude=exclude,
                    source_options=shared.source_options,
                )
            )
        current = work.count_current()
    refused = [job for job in jobs if immutable and changed[job.dest_uri]]
    forced = options.replace(force=force)
    sides = {"source_options": shared.source_options, "dest_options": shared.dest_options}
    kept = [job for job in jobs if job not in refused]
    marked = list(iter_marked(kept, lambda job: look_at_job(job, forced, **sides)))
    problems += [item.problem for item in marked if item.problem is not None]
    marked = [item for item in marked if item.problem is None]
    told = [problem.to_json() for problem in problems]
    told += [{"source": job.source_uri, "reason": "immutable", "detail": job.dest_uri} for job in refused]
    gone = [item for item in found if not item.kept]
    if gone and (too_many := excess(len(gone), max_delete)):
        told.append({"source": dest, "reason": "max_delete", "detail": too_many})
    # As a run does: with a problem nothing is deleted.
    deleted = [] if told else list(dict.fromkeys(path for item in gone for path in item.files))
    saved = sorted({path for item in marked for path in changed[item.job.dest_uri]}) + deleted
    plan: dict[str, Any] = {
        "dry_run": True,
        "convert": [item.to_json() for item in marked if not item.job.copies],
        "copy": [item.to_json() for item in marked if item.job.copies],
        "up_to_date": current,
        "delete": deleted,
        "keep": [item.output for item in found if item.kept or told],
        "back_up": saved if backs_up else [],
        "left_alone": [job.source_uri for job in left],
        "skipped": dict(work.entries.counts),
        "problems": told,
    }
    if shared.as_json:
        print_json(plan)
    else:
        for line in _plan_lines(plan, compares=checksum):
            print_line(line)
        if text := work.entries.links_words():
            print_line(text)
    return 1 if plan["problems"] else 0


def _plan_lines(plan: dict[str, Any], *, compares: bool) -> list[str]:
    rows = [
        (what, format_nbytes(item["size"]), f"{item['source']} -> {item['dest']}{_replaced(item)}")
        for what in ("convert", "copy")
        for item in plan[what]
    ]
    rows += [
        (what.replace("_", " "), "", path) for what in ("back_up", "delete", "keep") for path in plan[what]
    ]
    rows += [
        (
            "refuse",
            item["reason"],
            item["detail"] if item["reason"] == OutputExistsError.reason else item["source"],
        )
        for item in plan["problems"]
    ]
    counts = ", ".join(
        f"{name} {len(plan[key])}"
        for name, key in (("convert", "convert"), ("copy", "copy"), ("delete", "delete"))
    )
    lines = [*align(rows, indent=""), ""] if rows else []
    if plan["skipped"]:
        lines.append(f"passed over: {skipped_words(plan['skipped'])}")
    lines.append(
        f"would {counts}, up to date {plan['up_to_date']}, refused {len(plan['problems'])}; nothing written"
    )
    if compares:
        lines.append("--checksum compares by content only when it runs: it may find less or more to do")
    return lines


def _replaced(item: dict[str, Any]) -> str:
    return f" (replaces {', '.join(item['replaced'])})" if item["replaced"] else ""
