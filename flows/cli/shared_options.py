"""The options that every command takes, and what they come to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from flows.wishes import MAX_WORKERS, parse_duration

__all__ = ["Shared", "judging_options", "run_options", "runner_options", "shared_options", "split_options"]

Command = TypeVar("Command", bound=Callable[..., Any])
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
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else."),
        click.option("--quiet", "-q", is_flag=True, help="Neither progress nor summary, only problems."),
        click.option(
            "--source-options",
            type=_StorageOptions(),
            default="{}",
            metavar="JSON",
            help="fsspec storage options for SOURCE, or @FILE with them.",
        ),
        click.option(
            "--dest-options",
            type=_StorageOptions(),
            default="{}",
            metavar="JSON",
            help="fsspec storage options for DEST, or @FILE with them.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(LOG_LEVELS),
            default="warning",
            help="What else to tell on standard error; info: a line per checkpoint; debug: tracebacks.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["human", "json"]),
            default="human",
            help="json: progress as JSON lines, one per checkpoint with its duration and bytes.",
        ),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def runner_options(function: Command) -> Command:
    """Where batches are worked on, and how many at once."""
    decorators = [
        click.option(
            "--workers",
            type=click.IntRange(1, MAX_WORKERS),
            metavar="N",
            help="Batches worked on at once: one a core (2 to 16), or as many as the cluster has threads.",
        ),
        click.option(
            "--runner",
            type=click.Choice(["threads", "processes", "dask", "ray"]),
            default="threads",
            show_default=True,
            help="What works on them.",
        ),
        click.option(
            "--runner-address",
            metavar="ADDR",
            help="A running Dask scheduler or Ray head (tcp://HOST:8786, ray://HOST:10001).",
        ),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


_RUN_OPTIONS = ("fail_fast", "workers", "runner", "runner_address", "max_requests", "deadline")


def run_options(function: Command) -> Command:
    """How a run of many files is carried out, whatever it does with them; `split_options` takes them."""
    decorators = [
        click.option("--fail-fast", is_flag=True, help="Begin nothing new after the first problem."),
        runner_options,
        click.option(
            "--max-requests",
            type=click.IntRange(min=1),
            default=64,
            show_default=True,
            metavar="N",
            help="Requests to S3 under way at once, of the whole run.",
        ),
        click.option("--deadline", metavar="DURATION", help="Stop the run after that long: 90, 45m, 6h."),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def judging_options(function: Command) -> Command:
    """When a run of many files counts as one that went well."""
    return click.option(
        "--min-success",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="SHARE",
        help="Exit with 0 if that share of the checkpoints succeeds (0.99); acknowledged failures aside.",
    )(function)


def split_options(values: dict[str, Any]) -> tuple[dict[str, Any], Shared]:
    """What `run_options` and `shared_options` added to a command.

    Raises:
        UsageError: a deadline that is no duration.
    """
    carrying_out = {name: values.pop(name) for name in _RUN_OPTIONS}
    if carrying_out["deadline"] is not None:
        parse_duration(carrying_out["deadline"])
    return carrying_out, Shared(**values)
