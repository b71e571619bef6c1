"""`ptbin inspect`: what is in one checkpoint, from its index alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flows.cli.command import Shared, command
from flows.cli.printing import align, section
from flows.options import INSPECT
from flows.parsing import build_options
from ptbin.errors import CheckpointError
from ptbin.runs.units import counted, format_nbytes, left_out_words
from ptbin.stores import public_uri

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
        return shared.refuse(error, 1, uri=public_uri(uri))
    shared.answer(lambda: report, _lines(report))
    return 0


def _lines(report: dict[str, Any]) -> Iterator[str]:
    facts = [
        ("container", str(report["container"])),
        ("size", format_nbytes(report["size"])),
        ("verdict", str(report["verdict"])),
        ("selected", _selected(report)),
    ]
    if report["accounting"] is not None:
        facts.append(("taken", _taken(report["accounting"])))
        if report["accounting"]["left_out"]:
            facts.append(("left out", left_out_words(report["accounting"]["left_out"])))
    yield str(report["uri"])
    yield from align(facts)
    yield from section("state dicts", [_dict_row(row) for row in report["state_dicts"]])
    yield from section("tensors", [_tensor_row(row) for row in report["tensors"]])
    globals_named = [(f"{row['module']}.{row['name']}", row["verdict"]) for row in report["globals"]]
    yield from section("globals named by the pickle", globals_named)
    yield from section("findings", [(finding,) for finding in report.get("findings", [])])
    yield from section("notes", [(note,) for note in report["notes"]])


def _dict_row(row: dict[str, Any]) -> tuple[str, ...]:
    tensors = counted(row["tensors"], "tensor")
    return row["path"] or "(top)", tensors, format_nbytes(row["nbytes"]), row["role"] or ""


def _tensor_row(row: dict[str, Any]) -> tuple[str, ...]:
    shape = "x".join(map(str, row["shape"])) or "scalar"
    return row["name"], row["dtype"], shape, format_nbytes(row["nbytes"]), _made_of(row)


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
