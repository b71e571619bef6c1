"""Text for people: lines on standard error, results on standard output.

With `--log-format json` what goes to standard error is for a log collector: a JSON object a line.

What comes out of a file (names, messages that quote them) may hold control characters that would drive
the terminal; they are shown escaped.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from ptbin.stores import public_uri
from ptbin.values.names import visible

SHOWN_ROWS = 20


def printable(text: str) -> str:
    """`text` on one line, without passwords in URIs, what does not print as itself escaped."""
    return visible(public_uri(text))


def print_error(message: str, kind: str = "ptbin: error") -> None:
    """One line on standard error."""
    text = printable(" ".join(message.split()))
    if asks_for(sys.argv, "--log-format", "json"):
        text = log_line("message", "error" if kind.endswith("error") else "warning", message=text)
    else:
        text = f"{kind}: {text}"
    click.echo(text, err=True)


def log_line(event: str, level: str = "info", **facts: Any) -> str:
    """An event as a JSON object on one line, for a log collector."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": now, "level": level, "event": event, **facts})


def asks_for(words: Sequence[str], option: str, value: str) -> bool:
    """Whether a call gives an option this value; by its words, for errors before any option was parsed."""
    return f"{option}={value}" in words or (option, value) in itertools.pairwise(words)


def print_line(text: str = "") -> None:
    """One line on standard output."""
    click.echo(printable(text))


def print_lines_of_error(lines: Sequence[str]) -> None:
    """The lines of a report that belongs to an error, on standard error."""
    for line in lines:
        if asks_for(sys.argv, "--log-format", "json"):
            print_error(line)
        else:
            click.echo(f"  {printable(line)}", err=True)


def print_json(document: Mapping[str, Any]) -> None:
    """The one document of `--json`. ASCII only: any consumer's locale can read it."""
    click.echo(json.dumps(document, indent=2))


def and_more(count: int, shown: int | None = SHOWN_ROWS, where: str = "") -> list[str]:
    """The line behind the first `shown` of `count` rows: how many more there are, and where; or no line."""
    return [] if shown is None or count <= shown else [f"... and {count - shown:,} more{where}"]


def section(
    title: str,
    rows: Sequence[Sequence[str]],
    shown: int | None = SHOWN_ROWS,
    where: str = "; --json lists them all",
) -> list[str]:
    """A title with a count, and aligned rows below it; nothing where there are none."""
    if not rows:
        return []
    more = [f"  {line}" for line in and_more(len(rows), shown, where)]
    return [f"{title} ({len(rows)})", *align(rows[:shown]), *more]


def align(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: str = "  ") -> list[str]:
    """Rows as lines with aligned columns; the columns in `right` are flush right, the last one is free."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines
