"""The summary at the end of a run, for people: values in, lines out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from flows.cli.printing import SHOWN_ROWS, align, and_more, print_error
from flows.interrupts import INTERRUPTED_STATUS
from ptbin.catalog.entries import skipped_words
from ptbin.errors import short_detail
from ptbin.runs.units import counted, format_nbytes, left_out_words

if TYPE_CHECKING:
    from flows.cli.command import Shared
    from ptbin.catalog import Job
    from ptbin.runs.outcomes import Outcome

JSON_KEYS = (
    "run_id", "source", "dest", "converted", "up_to_date", "rejected", "failed", "known", "new", "resolved",
    "left_alone", "skipped", "not_tried", "source_bytes", "read_bytes", "written_bytes", "left_out",
    "seconds", "manifests", "problems", "known_problems", "resolved_problems",
)  # fmt: skip
"""The `--json` summary of `convert`, in this order."""

MIGRATE_KEYS = (
    "run_id", "source", "dest", "migrated", "up_to_date", "rejected", "failed", "known", "new", "resolved",
    "skipped", "left_alone", "updated", "source_bytes", "read_bytes", "written_bytes", "seconds", "versions",
    "manifests", "problems", "known_problems", "resolved_problems",
)  # fmt: skip
"""The `--json` summary of `migrate`; counts are of versions."""

KEYS = {
    "convert": JSON_KEYS,
    "restore": (*JSON_KEYS, "initial"),
    "sync": (*JSON_KEYS, "copied", "deleted", "backed_up", "kept"),
    "migrate": MIGRATE_KEYS,
}

LEFT_ALONE = "what training leaves next to weights: optimizers, schedulers, ..."
SHOWN_VERSIONS = 40


def _conversion_lines(summary: Mapping[str, Any]) -> list[str]:
    """The table of outcomes, the problems, and where the run record lies."""
    moved = (
        f"{format_nbytes(summary['source_bytes'])} of checkpoints, "
        f"{format_nbytes(summary['read_bytes'])} read, {format_nbytes(summary['written_bytes'])} written"
    )
    if summary["copied_bytes"]:
        moved += f", {format_nbytes(summary['copied_bytes'])} of it copied inside the store"
    skipped = summary.get("skipped", {})
    rows = _outcome_rows(summary, "converted", moved) + _rows_of_some(
        ("left alone", summary["left_alone"], LEFT_ALONE),
        ("passed over", sum(skipped.values()), skipped_words(skipped)),
        ("not tried", summary.get("not_tried", 0), "the run ended before it got to them"),
    )
    if "copied" in summary:
        rows.insert(1, ("copied", str(summary["copied"]), "files as they are" if summary["copied"] else ""))
        rows += [("deleted", str(summary["deleted"]), f"{summary['kept']} kept" if summary["kept"] else "")]
        rows += [("backed up", str(summary["backed_up"]), "")]
    lines = align(rows, right=[1], indent="")
    if summary["left_out"]:
        lines.append(f"left out: {left_out_words(summary['left_out'])}")
    if "copied" in summary and not any(summary[key] for key in ("converted", "copied", "deleted", "kept")):
        fine = not summary["problems"] and not summary.get("reported")
        lines += ["", "nothing to do: DEST is in step" if fine else "nothing was changed"]
    return lines + _last_lines(summary)


def _migration_lines(summary: Mapping[str, Any]) -> list[str]:
    """The table of outcomes, which version became which, the problems, and where the run record lies."""
    moved = (
        f"{format_nbytes(summary['source_bytes'])} of checkpoints, "
        f"{format_nbytes(summary['written_bytes'])} written, {summary['copied']} files as they are"
    )
    rows = _outcome_rows(summary, "migrated", moved) + _rows_of_some(
        ("without a checkpoint", summary["skipped"], "left where they are"),
        ("files left alone", summary["left_alone"], LEFT_ALONE),
        ("models updated", summary["updated"], "descriptions, tags, aliases"),
    )
    lines = align(rows, right=[1], indent="")
    migrated = [row for row in summary["versions"] if row["outcome"] == "migrated"]
    if migrated:
        lines += ["", *align([version_row(row) for row in migrated[:SHOWN_VERSIONS]], indent="")]
        lines += and_more(len(migrated), SHOWN_VERSIONS, ", in the run record")
    elif not summary["problems"] and not summary.get("reported") and not summary["updated"]:
        lines += ["", "nothing to do: DEST is in step"]
    return lines + _last_lines(summary)


def _outcome_rows(summary: Mapping[str, Any], made: str, moved: str) -> list[tuple[str, str, str]]:
    """The counts that every run has."""
    rows = [(made, str(summary[made]), moved if summary[made] else "")]
    always = ("up_to_date", "rejected", "failed")
    rows += [(name.replace("_", " "), str(summary[name]), "") for name in always]
    return rows + _rows_of_some(("known", summary["known"], "failures that are acknowledged"))


def _rows_of_some(*rows: tuple[str, int, str]) -> list[tuple[str, str, str]]:
    """Rows of what there is any of."""
    return [(what, str(count), note) for what, count, note in rows if count]


def _last_lines(summary: Mapping[str, Any]) -> list[str]:
    """The problems, and where the run record lies."""
    lines = ["", *_problem_lines(summary["problems"])] if summary["problems"] else []
    if summary.get("reported"):
        lines.append(counted(summary["reported"], "problem") + ", listed above")
    if summary["known_problems"]:
        lines += ["", "known:", *_problem_lines(summary["known_problems"])]
    if summary["resolved"]:
        lines += ["", f"{summary['resolved']} that failed before no longer do"]
    lines += ["", f"{summary['seconds']:.1f} s, run {summary['run_id']}"]
    if summary.get("record"):
        lines.append(f"run record and report: {summary['record']}")
    return lines


def version_row(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Model and version, what it is called there, its aliases."""
    aliases = ", ".join(f"@{alias}" for alias in row["aliases"])
    return f"{row['model']} {row['version']}", f"-> {row['dest_version'] or '-'}", aliases


def single_lines(entry: Outcome, job: Job, seconds: float) -> list[str]:
    """The outcome of a single conversion; a problem was printed before."""
    if entry.kind == "up_to_date":
        return [f"{job.dest_uri} is up to date"]
    if entry.converted is None:
        return []
    source = f"{job.path} ({format_nbytes(entry.nbytes)})"
    written = format_nbytes(sum(output.size for output in entry.converted.outputs))
    tensors = counted(entry.converted.tensors, "tensor")
    lines = [f"{source} -> {job.dest_uri} ({written}): {tensors}, {seconds:.1f} s"]
    if entry.converted.left_out:
        lines.append(f"left out: {left_out_words(entry.converted.left_out)}")
    return lines


def _initial_lines(summary: Mapping[str, Any]) -> list[str]:
    """What `restore --allow-missing` let through: names that keep the values that the model's code gave."""
    lines = []
    rows = summary.get("initial", ())
    for row in rows[:SHOWN_ROWS]:
        names = row["names"]
        more = f" and {len(names) - SHOWN_ROWS} more" if len(names) > SHOWN_ROWS else ""
        lines.append(f"initial values kept in {row['source']}: {', '.join(names[:SHOWN_ROWS])}{more}")
    return lines + and_more(len(rows), where=", by their manifests")


def report_run(
    kind: str, summary: Mapping[str, Any], reported: AbstractSet[tuple[str, str]], shared: Shared
) -> int:
    """Print the end of a run over a whole store; its exit status.

    `reported`: problems that were printed during the run; they are counted and not listed again.
    """
    left = [row for row in summary["problems"] if (row["reason"], row["detail"]) not in reported]
    shown = {**summary, "problems": left, "reported": len(summary["problems"]) - len(left)}
    lines = _migration_lines(shown) if kind == "migrate" else _conversion_lines(shown)
    return report_summary(kind, summary, lines, shared)


def report_summary(kind: str, summary: Mapping[str, Any], lines: Sequence[str], shared: Shared) -> int:
    """Print the end of a run of that kind as the options ask; its exit status."""
    interrupted = bool(summary.get("interrupted"))
    end = {"reason": "interrupted", "exit_status": INTERRUPTED_STATUS} if interrupted else {}
    shared.answer(lambda: {key: summary[key] for key in KEYS[kind]} | end, [*lines, *_initial_lines(summary)])
    if interrupted:
        print_error("interrupted", kind="ptbin")
        return INTERRUPTED_STATUS
    return 0 if summary["succeeded"] else 1


def verification_lines(summary: Mapping[str, Any]) -> list[str]:
    rows = [
        ("proven", str(summary["proven"])),
        ("failed", str(summary["failed"])),
        ("outputs without a manifest", str(summary["orphans"])),
    ]
    lines = align(rows, right=[1], indent="")
    problems = [{"source": issue["uri"], **issue} for issue in summary["issues"]]
    if problems:
        lines += ["", *_problem_lines(problems, "; --json lists them all")]
    return [*lines, "", f"{summary['seconds']:.1f} s"]


def _problem_lines(problems: Sequence[Mapping[str, Any]], where: str = ", in the run record") -> list[str]:
    lines = []
    for problem in problems[:SHOWN_ROWS]:
        lines.append(f"{problem['reason']}: {problem['source']}{_since(problem)}")
        lines.append(f"    {short_detail(problem['source'], problem['detail'])}")
    return lines + and_more(len(problems), where=where)


def _since(problem: Mapping[str, Any]) -> str:
    """Of a failure that was there before, since when; of a known one, what is known."""
    if problem.get("because"):
        return f" (since {problem['since'][:10]}; {problem['because']})"
    return f" (since {problem['since'][:10]})" if problem.get("novelty") == "old" else ""
