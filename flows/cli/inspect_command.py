"""`ptbin inspect`: what is in one checkpoint, from its index alone."""

from __future__ import annotations

from typing import Any

from flows.cli.command import command
from flows.cli.printing import align, print_error, print_json, print_line
from flows.cli.shared_options import Shared
from flows.options import INSPECT
from flows.parsing import build_options
from ptbin.errors import CheckpointError
from ptbin.runs.units import counted, format_nbytes, left_out_words
from ptbin.stores import public_uri

__all__ = ["inspect_command"]

SHOWN_ROWS = 20

EPILOG = """\b
Examples:
  ptbin inspect run1/last.ckpt
  ptbin inspect s3://models/run1/last.ckpt --json | jq .verdict

Reads only the index, a few kilobytes of any file, and runs nothing of what is in it."""


@command("inspect", ["uri"], INSPECT, EPILOG)
def inspect_command(uri: str, asked: dict[str, Any], shared: Shared) -> int:
    """Describe the checkpoint at URI: what is in it, and what convert would take."""
    import ptbin

    try:
        report = ptbin.inspect(uri, storage_options=shared.source_options, options=build_options(asked))
    except CheckpointError as error:
        if shared.as_json:
            refusal = {"reason": error.reason, "detail": str(error), "exit_status": 1}
            print_json({"uri": public_uri(uri), **refusal})
        print_error(f"{error.reason}: {error}")
        return 1
    if shared.as_json:
        print_json(report)
    elif not shared.quiet:
        _print_report(report)
    return 0


def _print_report(report: dict[str, Any]) -> None:
    facts: list[tuple[str, ...]] = [
        ("container", str(report["container"])),
        ("size", format_nbytes(report["size"])),
        ("verdict", str(report["verdict"])),
        ("selected", _selected(report)),
    ]
    if report["accounting"] is not None:
        facts.append(("taken", _taken(report["accounting"])))
        if report["accounting"]["left_out"]:
            facts.append(("left out", left_out_words(report["accounting"]["left_out"])))
    print_line(str(report["uri"]))
    _print_rows(facts)
    _print_section(
        "state dicts",
        [
            (
                row["path"] or "(top)",
                counted(row["tensors"], "tensor"),
                format_nbytes(row["nbytes"]),
                row["role"] or "",
            )
            for row in report["state_dicts"]
        ],
    )
    _print_section(
        "tensors",
        [
            (
                row["name"],
                row["dtype"],
                "x".join(map(str, row["shape"])) or "scalar",
                format_nbytes(row["nbytes"]),
                _made_of(row),
            )
            for row in report["tensors"]
        ],
    )
    _print_section(
        "globals named by the pickle",
        [(f"{row['module']}.{row['name']}", row["verdict"]) for row in report["globals"]],
    )
    _print_section("findings", [(finding,) for finding in report.get("findings", [])])


def _made_of(row: dict[str, Any]) -> str:
    """The plan of one tensor: its sources and the pieces that it is put together from."""
    names = row.get("made_of", [])
    sources = f"from {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") if names else ""
    pieces = f"{row['pieces']} pieces" if "pieces" in row else ""
    return ", ".join(filter(None, (sources, pieces)))


def _taken(accounting: dict[str, Any]) -> str:
    taken, whole = accounting["taken_bytes"], accounting["source_tensor_bytes"]
    return f"{format_nbytes(taken)} of {format_nbytes(whole)} of tensors"


def _selected(report: dict[str, Any]) -> str:
    if report["reason"] is not None:
        return f"none: {report['reason']}: {report['detail']}"
    return f"{report['selected'] or '(top)'}: {report['why']}"


def _print_section(title: str, rows: list[tuple[str, ...]]) -> None:
    if not rows:
        return
    print_line(f"{title} ({len(rows)})")
    _print_rows(rows[:SHOWN_ROWS])
    if len(rows) > SHOWN_ROWS:
        print_line(f"  ... and {len(rows) - SHOWN_ROWS} more; --json lists them all")


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    for line in align(rows):
        print_line(line)
