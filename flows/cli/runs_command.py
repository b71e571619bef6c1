"""`ptbin runs`: the history of a destination, from its run records; no Prefect, no server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flows.cli.command import Shared, command
from flows.cli.printing import align
from ptbin.runs.units import format_nbytes, format_seconds
from ptbin.stores import public_uri
from ptbin.values.options import Option

if TYPE_CHECKING:
    from ptbin.history.records import RecordedRun

COUNTS = (
    *("converted", "copied", "up_to_date", "rejected", "failed", "known", "left_alone"),
    *("not_checkpoints", "not_tried", "deleted"),
)
BYTES = ("source_bytes", "read_bytes", "written_bytes", "copied_bytes")

EPILOG = """\b
Examples:
  ptbin runs weights/
  ptbin runs s3://models/weights --last 50
  ptbin runs weights/ --json | jq '.runs[] | select(.succeeded | not) | .run_id'

Reads DEST/_ptbin/runs: one listing, and one read for each run that is shown.

Exit status: 0 the history was read; 2 the call was wrong, or there is no DEST."""


@command("runs", ["dest"], [Option("last", "Show N runs.", 20, "count", metavar="N")], EPILOG)
def runs_command(dest: str, asked: dict[str, Any], shared: Shared) -> int:
    """Show the runs that wrote into DEST, newest first."""
    from ptbin.history.records import iter_runs

    runs = list(iter_runs(dest, last=asked["last"], storage_options=shared.dest_options))
    lines = align([_row(run) for run in runs], indent="") or [f"no runs are recorded below {dest}"]
    document = {"dest": public_uri(dest), "runs": [_to_json(run) for run in runs]}
    shared.answer(lambda: document, lines, even_quiet=True)
    return 0


def _to_json(run: RecordedRun) -> dict[str, Any]:
    if run.problem:
        return {"run_id": run.run_id, "problem": run.problem}
    return {
        "run_id": run.run_id,
        "kind": run.text("kind"),
        "source": run.text("source"),
        "began": run.began,
        "seconds": run.number("seconds"),
        "succeeded": run.succeeded,
        "interrupted": bool(run.facts.get("interrupted")),
        **{name: run.facts[name] for name in (*COUNTS, *BYTES) if name in run.facts},
        "message": run.text("message"),
        "prefect_flow_run_id": run.facts.get("prefect_flow_run_id"),
    }


def _row(run: RecordedRun) -> Sequence[str]:
    if run.problem:
        return (run.began.replace("T", " "), "unreadable", "", "", run.run_id, run.problem)
    ended = "interrupted" if run.facts.get("interrupted") else "ok" if run.succeeded else "failed"
    always = ("converted", "up_to_date", "rejected", "failed")
    counts = ", ".join(
        f"{name.replace('_', ' ')} {run.number(name):,}"
        for name in COUNTS
        if name in always or run.number(name)
    )
    read, written = (format_nbytes(run.number(name)) for name in ("read_bytes", "written_bytes"))
    return (
        run.began.replace("T", " "),
        ended,
        f"{run.text('kind')} {format_seconds(run.number('seconds'))}",
        f"{read} read, {written} written",
        run.run_id,
        counts,
    )
