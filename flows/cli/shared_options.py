"""The options that every command takes, and what they come to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from flows.cli.help import ACCESS, PRINTING, GroupedOption

__all__ = ["Shared", "shared_options"]

Command = TypeVar("Command", bound=Callable[..., Any])
_PRINTING: dict[str, Any] = {"cls": GroupedOption, "group": PRINTING}
_ACCESS: dict[str, Any] = {"cls": GroupedOption, "group": ACCESS}
LOG_LEVELS = ["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Shared:
    """What the options shared by all commands say. `repr` shows no storage options."""

    as_json: bool
    quiet: bool
    log_level: str
    log_format: str
    source_options: dict[str, Any] = field(repr=False)
    dest_options: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Shared:
        """Out of a command's values, which may have others as well."""
        return cls(**{entry.name: values[entry.name] for entry in fields(cls)})

    @property
    def live_bar(self) -> bool:
        """Whether someone watches standard error on a terminal that can redraw a line."""
        import os

        return (
            not self.quiet
            and self.log_format == "human"
            and sys.stderr.isatty()
            and os.environ.get("TERM", "dumb") != "dumb"
        )


class _StorageOptions(click.ParamType[Any]):
    """A JSON object, or `@FILE` that holds one. Errors never quote it: it may be a secret."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        text = str(value)
        if text.startswith("@"):
            try:
                text = Path(text[1:]).read_text()
            except OSError as error:
                self.fail(f"cannot read {text[1:]}: {error.strerror}", param, ctx)
        try:
            options = json.loads(text)
        except ValueError:
            options = None
        if not isinstance(options, dict):
            self.fail("not a JSON object, nor @FILE with one in it", param, ctx)
        return options


def shared_options(function: Command) -> Command:
    """Add the shared options to a command; it gets them as `as_json`, `quiet`, `log_level`, ..."""
    decorators = [
        click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON document, nothing else.", **_PRINTING
        ),
        click.option(
            "--quiet", "-q", is_flag=True, help="Neither progress nor summary, only problems.", **_PRINTING
        ),
        click.option(
            "--source-options",
            type=_StorageOptions(),
            default="{}",
            metavar="JSON",
            help="fsspec storage options for SOURCE, or @FILE with them.",
            **_ACCESS,
        ),
        click.option(
            "--dest-options",
            type=_StorageOptions(),
            default="{}",
            metavar="JSON",
            help="fsspec storage options for DEST, or @FILE with them.",
            **_ACCESS,
        ),
        click.option(
            "--log-level",
            type=click.Choice(LOG_LEVELS),
            default="warning",
            help="What else to tell on standard error; info: a line per checkpoint; debug: tracebacks.",
            **_PRINTING,
        ),
        click.option(
            "--log-format",
            type=click.Choice(["human", "json"]),
            default="human",
            help="json: progress as JSON lines, one per checkpoint with its duration and bytes.",
            **_PRINTING,
        ),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function
