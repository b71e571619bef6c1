"""The options that every command takes, and their values."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from flows.cli.help import ACCESS, PRINTING
from ptbin.values.options import Option

if TYPE_CHECKING:
    from ptbin.stores import Sides

__all__ = ["SHARED", "Shared"]

SHARED = (
    Option("as_json", "Print one JSON document, nothing else.", False, "flag", flag="--json", group=PRINTING),
    Option(
        "quiet",
        "Neither progress nor summary, only problems.",
        False,
        "flag",
        flag="--quiet -q",
        group=PRINTING,
    ),
    Option(
        "source_options",
        "fsspec storage options for SOURCE, or @FILE with them.",
        "{}",
        "storage",
        metavar="JSON",
        group=ACCESS,
    ),
    Option(
        "dest_options",
        "fsspec storage options for DEST, or @FILE with them.",
        "{}",
        "storage",
        metavar="JSON",
        group=ACCESS,
    ),
    Option(
        "log_level",
        "What else to tell on standard error; info: a line per checkpoint; debug: tracebacks.",
        "warning",
        "choice",
        ("debug", "info", "warning", "error"),
        group=PRINTING,
    ),
    Option(
        "log_format",
        "json: progress as JSON lines, one per checkpoint with its duration and bytes.",
        "human",
        "choice",
        ("human", "json"),
        group=PRINTING,
    ),
)


@dataclass(frozen=True, slots=True)
class Shared:
    """The values of the options in `SHARED`. `repr` shows no storage options."""

    as_json: bool
    quiet: bool
    log_level: str
    log_format: str
    source_options: dict[str, Any] = field(repr=False)
    dest_options: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Shared:
        """From a command's values, which may include others."""
        return cls(**{entry.name: values[entry.name] for entry in fields(cls)})

    @property
    def sides(self) -> Sides:
        """What makes places of texts."""
        from ptbin.stores import Sides

        return Sides(self.source_options, self.dest_options)

    @property
    def live_bar(self) -> bool:
        """Whether someone watches standard error on a terminal that can redraw a line."""
        return (
            not self.quiet
            and self.log_format == "human"
            and sys.stderr.isatty()
            and os.environ.get("TERM", "dumb") != "dumb"
        )
