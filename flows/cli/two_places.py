"""What the commands from SOURCE to DEST share: their two places, `--dry-run`, the shared options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from flows.cli.help import GroupedCommand, GroupedOption, PlaceType
from flows.cli.options import takes
from flows.cli.shared_options import shared_options
from flows.options import RUN
from ptbin.values.options import Option

__all__ = ["two_places"]

Function = Callable[..., Any]


def two_places(
    name: str,
    options: Sequence[Option],
    epilog: str,
    *,
    dry_run: str = "Print what would be done, and what would be replaced.",
    cls: type[GroupedCommand] = GroupedCommand,
) -> Callable[[Function], click.Command]:
    """A command of SOURCE and DEST with these options; `dry_run` is the help of `--dry-run`."""

    def decorate(function: Function) -> click.Command:
        for add in (
            shared_options,
            click.option("--dry-run", is_flag=True, help=dry_run, cls=GroupedOption, group=RUN),
            takes(options),
            click.argument("dest", type=PlaceType()),
            click.argument("source", type=PlaceType()),
        ):
            function = add(function)
        return click.command(name, epilog=epilog, cls=cls)(function)

    return decorate
