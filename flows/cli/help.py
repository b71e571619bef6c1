"""How the help of a command reads: examples first, then its options below headings.

The heading of an option is its `group`, which `ptbin.values.options.Option` carries; options without one come
first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

PRINTING = "What is printed"
ACCESS = "Access to stores"
UNGROUPED = "Options"


class GroupedOption(click.Option):
    """An option with the heading that it stands below."""

    def __init__(self, *arguments: Any, group: str = "", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.group = group or UNGROUPED

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """The option, with the variable that its value came from."""
        hint = super().get_error_hint(ctx)
        if ctx is None or ctx.get_parameter_source(self.name) is not ParameterSource.ENVIRONMENT:
            return hint
        return f"{hint} (from {next(name for name in self.envvar or () if os.environ.get(name))})"


class GroupedCommand(click.Command):
    """A command whose help begins with its examples and has its options in groups."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        self.format_epilog(ctx, formatter)
        self.format_options(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {UNGROUPED: []}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None:
                last = PRINTING if "--help" in option.opts else UNGROUPED
                groups.setdefault(getattr(option, "group", last), []).append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class GroupedCommands(click.Group):
    """The command of commands: each with its whole first sentence, below a heading.

    `groups`: the commands below each heading, in order.
    """

    def __init__(self, *arguments: Any, groups: Mapping[str, Sequence[str]], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.groups = groups

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        for title, names in self.groups.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name, self.commands[name].get_short_help_str(limit=1000)) for name in names]
                )


class PlaceType(click.ParamType[str]):
    """A path or a URL, as text; shells complete it as a path."""

    name = "uri"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        del param, ctx
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        del ctx, param
        return [CompletionItem(incomplete, type="file")]
