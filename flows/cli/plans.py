"""A dry run on the terminal: one document, or one line for each thing that the run would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flows.cli.command import Shared
from flows.cli.printing import align
from flows.cli.summary import version_row
from ptbin.catalog.entries import skipped_words
from ptbin.errors import OutputExistsError
from ptbin.runs.units import counted, format_nbytes

if TYPE_CHECKING:
    from ptbin.catalog import Problem
    from ptbin.runs.dry_run import DryRun, PlannedJob


def print_dry_run(found: DryRun, shared: Shared) -> int:
    """Print what the run would do; the exit status: 1 where it would refuse anything."""
    shared.answer(found.to_json, _lines(found), even_quiet=True)
    return 1 if found.problems else 0


def print_migration(document: Mapping[str, Any], shared: Shared) -> int:
    """The same of a migration, whose document `ptbin.runs.migrating.dry_run` makes."""
    shared.answer(lambda: document, _migration_lines(document), even_quiet=True)
    return 1 if document["problems"] else 0


def _lines(found: DryRun) -> Iterator[str]:
    verb = "restore" if found.request.kind == "restore" else "convert"
    mirrors = found.request.kind == "sync"
    rows = [_row("copy" if item.job.copies else verb, item) for item in found.jobs]
    quiet = {"leave alone": found.left_alone, "not a checkpoint": found.not_checkpoints}
    if not mirrors:
        quiet = {"up to date": found.up_to_date, **quiet}
    rows += [(what, format_nbytes(job.source_size), job.path) for what, jobs in quiet.items() for job in jobs]
    files = {"back up": found.back_up, "delete": found.delete, "keep": found.keep}
    rows += [(what, "", path) for what, paths in files.items() for path in paths]
    rows += [_refused_row("refuse", problem) for problem in found.problems]
    rows += [_refused_row("known", problem) for problem in found.known]
    yield from align(rows, indent="")
    if found.skipped:
        yield f"passed over: {skipped_words(found.skipped)}"
    if rows:
        yield ""
    yield f"would {_counts(found, verb)}; nothing was written"
    if found.links:
        yield found.links


def _counts(found: DryRun, verb: str) -> str:
    made = [item for item in found.jobs if not item.job.copies]
    parts = [f"{verb} {len(made)} ({format_nbytes(sum(item.job.source_size for item in made))})"]
    if found.request.kind == "sync":
        parts += [f"copy {len(found.jobs) - len(made)}", f"delete {len(found.delete)}"]
    if replaced := sum(1 for item in found.jobs if item.files.replaces):
        parts.append(f"of them replace {replaced}")
    parts += [f"up to date {len(found.up_to_date)}", f"refused {len(found.problems)}"]
    if found.known:
        parts.append(f"known failures {len(found.known)}")
    if found.left_alone:
        parts.append(f"left alone {len(found.left_alone)}")
    if found.not_checkpoints:
        parts.append(f"not checkpoints {len(found.not_checkpoints)}")
    return ", ".join(parts)


def _row(what: str, item: PlannedJob) -> tuple[str, str, str]:
    files, job = item.files, item.job
    replaced = f" (replaces {', '.join(files.replaces)})" if files.replaces else ""
    removed = f" (removes {', '.join(files.removes)})" if files.removes else ""
    return (what, format_nbytes(job.source_size), f"{job.path} -> {job.dest_uri}{replaced}{removed}")


def _refused_row(what: str, problem: Problem) -> tuple[str, str, str]:
    """Where a file is in the way, which one; else the source that is refused."""
    in_the_way = problem.reason == OutputExistsError.reason
    return (what, problem.reason, problem.detail if in_the_way else problem.source)


def _migration_lines(plan: Mapping[str, Any]) -> list[str]:
    """What a migration would do, one version a line, and what would not be kept."""
    rows = []
    known = {problem["source"] for problem in plan["known_problems"]}
    for row in plan["versions"]:
        what, where, aliases = version_row(row)
        if row["action"] == "refused":
            verb = "known" if f"{row['model']}/{row['version']}" in known else "refuse"
            rows.append((verb, what, row["reason"], row["detail"]))
        else:
            notes = [aliases, *row["not_kept"], *row.get("checkpoints", ())]
            if row.get("replaces"):
                notes.insert(0, "replaces what ptbin registered there")
            rows.append((row["action"].replace("_", " "), what, where, "; ".join(filter(None, notes))))
    lines = [*align(rows, indent=""), ""] if rows else []
    if plan["not_kept"]:
        lines += ["not kept:", *(f"  {text}" for text in plan["not_kept"]), ""]
    if plan["updates"]:
        lines += [f"would bring in step: {', '.join(plan['updates'])}", ""]
    counts = Counter(row["action"] for row in plan["versions"])
    lines.append(
        f"would migrate {counted(counts['migrate'], 'version')}, up to date {counts['up_to_date']}, "
        f"refused {counts['refused'] - len(known)}"
        + (f", known failures {len(known)}" if known else "")
        + "; nothing was written"
    )
    return lines
