"""`@command`: a command of places and of options that are declared in tables, as in `flows.options`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click

from flows.cli.help import GroupedCommand, PlaceType
from flows.cli.options import takes
from flows.cli.shared_options import SHARED, Shared
from flows.options import RUN, chosen
from ptbin.values.options import Option

__all__ = ["command", "dry_run_option"]


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
            shared = Shared.of(values)
            asked = chosen(options, values)
            arguments = {name: value for name, value in values.items() if name not in asked}
            for entry in SHARED:
                del arguments[entry.name]
            return function(**arguments, asked=asked, shared=shared)

        made: Callable[..., int] = takes((*options, *SHARED))(run)
        for place in reversed(places):
            made = click.argument(place, type=PlaceType())(made)
        return click.command(name, epilog=epilog, cls=cls)(made)

    return decorate
