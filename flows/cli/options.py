"""The command line's options, made of the tables in `flows.options`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from flows.cli.help import GroupedOption
from flows.wishes import parse_duration, parse_size
from ptbin.errors import UsageError
from ptbin.values.options import Option

__all__ = ["takes"]

Command = TypeVar("Command", bound=Callable[..., Any])

MAX_RECIPE_NBYTES = 1 << 20


class ShareType(click.ParamType[float]):
    """A share of 1, or the same in percent: `0.99`, `99%`."""

    name = "float range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            self.fail(f"{text!r} is not a share, such as 0.99 or 99%", param, ctx)
        return share


def takes(options: Sequence[Option]) -> Callable[[Command], Command]:
    """Add them to a command, which gets each under its own name."""

    def decorate(function: Command) -> Command:
        for entry in reversed(options):
            function = _click_option(entry)(function)
        return function

    return decorate


def _click_option(entry: Option) -> Callable[[Any], Any]:
    flag = entry.flag or "--" + entry.name.replace("_", "-")
    settings: dict[str, Any] = {"help": entry.help, "metavar": entry.metavar or None, "group": entry.group}
    if entry.kind == "flag":
        settings["is_flag"] = True
    elif entry.kind in {"list", "pairs", "paths"} and entry.name != "files_from":
        settings["multiple"] = True
        settings["help"] = f"{entry.help.removesuffix('.')} (repeatable)."
    elif entry.kind == "choice":
        settings |= {"type": click.Choice(entry.choices), "default": entry.default}
        settings["show_default"] = entry.default is not None
        settings["metavar"] = entry.metavar or ("NAME" if len(entry.choices) > MAX_SHOWN_CHOICES else None)
    elif entry.kind == "count":
        settings |= {"type": click.IntRange(entry.least, entry.most), "default": entry.default}
        settings["show_default"] = entry.default is not None
    elif entry.kind == "share":
        settings["type"] = ShareType()
    elif entry.kind == "size":
        settings |= {"callback": _checking(parse_size), "metavar": "SIZE"}
    elif entry.kind == "duration":
        settings |= {"callback": _checking(parse_duration), "metavar": "DURATION"}
    elif entry.kind == "json":
        settings["callback"] = _parse_json
    elif entry.name == "recipe":
        settings["callback"] = _read_recipe
    return click.option(flag, entry.name, cls=GroupedOption, **settings)


MAX_SHOWN_CHOICES = 4


def _checking(parse: Callable[[str], object]) -> Callable[[Any, Any, str | None], str | None]:
    def check(_context: Any, _option: Any, value: str | None) -> str | None:
        if value is not None:
            try:
                parse(value)
            except UsageError as error:
                raise click.BadParameter(str(error)) from error
        return value

    return check


def _parse_json(_context: Any, _option: Any, value: str | None) -> Any:
    if value is None:
        return None
    try:
        arguments = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}") from error
    if not isinstance(arguments, (dict, list)):
        raise click.BadParameter("a JSON object (keyword arguments) or array (positional ones)")
    return arguments


def _read_recipe(_context: Any, _option: Any, value: str | None) -> str | None:
    """A file's content, or the name of a shipped one."""
    if value is None or not os.path.isfile(value):
        return value
    with open(value, encoding="utf-8") as file:
        try:
            text = file.read(MAX_RECIPE_NBYTES + 1)
        except UnicodeDecodeError as error:
            raise click.BadParameter(f"{value} is not UTF-8 text") from error
    if not text.lstrip().startswith("{"):
        raise click.BadParameter(f"{value} is not a JSON object")
    return text
