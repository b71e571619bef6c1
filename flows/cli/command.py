"""`@command`: a command of places and of options that are declared in tables, as in `flows.options`.

Every command takes the options in `SHARED` as well; its function gets them as a `Shared`, which also prints
the command's answer as they ask.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from flows.cli.help import ACCESS, PRINTING, GroupedCommand, PlaceType
from flows.cli.options import takes
from flows.cli.printing import print_error, print_json, print_line
from flows.options import RUN, chosen
from ptbin.errors import PtbinError
from ptbin.values.options import Option

if TYPE_CHECKING:
    from ptbin.stores import Sides

_printing = partial(Option, group=PRINTING)
_access = partial(Option, default="{}", kind="storage", metavar="JSON", group=ACCESS)

SHARED = (
    _printing("as_json", "Print one JSON document, nothing else.", False, "flag", flag="--json"),
    _printing("quiet", "Neither progress nor summary, only problems.", False, "flag", flag="--quiet -q"),
    _access("source_options", "fsspec storage options for SOURCE, or @FILE with them."),
    _access("dest_options", "fsspec storage options for DEST, or @FILE with them."),
    _printing(
        "log_level",
        "What else to print on standard error; info: a line per checkpoint; debug: tracebacks.",
        "warning",
        "choice",
        ("debug", "info", "warning", "error"),
    ),
    _printing(
        "log_format",
        "json: progress as JSON lines, one per checkpoint with its duration and bytes.",
        "human",
        "choice",
        ("human", "json"),
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

    def answer(
        self,
        document: Callable[[], Mapping[str, Any]],
        lines: Iterable[str],
        *,
        even_quiet: bool = False,
    ) -> None:
        """Print what a command has to say: the document of `--json`, or lines for people.

        `even_quiet`: the lines are what the command was called for, so `--quiet` does not leave them out.
        """
        if self.as_json:
            print_json(document())
        elif even_quiet or not self.quiet:
            for line in lines:
                print_line(line)

    def refuse(self, error: PtbinError, status: int, **places: str) -> int:
        """Print why the command has no answer about these places; the exit status."""
        if self.as_json:
            print_json({**places, "reason": error.reason, "detail": str(error), "exit_status": status})
        print_error(f"{error.reason}: {error}")
        return status


def dry_run_option(text: str = "Print what would be done, and what would be replaced.") -> Option:
    """`--dry-run`, described by `text`."""
    return Option("dry_run", text, False, "flag", group=RUN)


def command(
    name: str,
    places: Sequence[str],
    options: Sequence[Option],
    epilog: str,
    *,
    cls: type[GroupedCommand] = GroupedCommand,
) -> Callable[[Callable[..., int]], click.Command]:
    """A command with these places and options, and with those that all commands take.

    Its function gets each place by its name, the options' values as `asked`, by name, and `shared`.
    """

    def decorate(function: Callable[..., int]) -> click.Command:
        @functools.wraps(function)
        def run(**values: Any) -> int:
            shared = Shared(**{entry.name: values.pop(entry.name) for entry in fields(Shared)})
            asked = chosen(options, values)
            arguments = {name: value for name, value in values.items() if name not in asked}
            return function(**arguments, asked=asked, shared=shared)

        made: Callable[..., int] = takes((*options, *SHARED))(run)
        for place in reversed(places):
            made = click.argument(place, type=PlaceType())(made)
        return click.command(name, epilog=epilog, cls=cls)(made)

    return decorate
