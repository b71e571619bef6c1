"""The command line's options, made from tables: what is typed, or set in the environment, becomes a value."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from flows.cli.help import GroupedOption
from flows.parsing import parse_duration, parse_share, parse_size
from ptbin.errors import UsageError
from ptbin.merging.shipped import SHIPPED
from ptbin.values.options import Kind, Option

Command = TypeVar("Command", bound=Callable[..., Any])

MAX_RECIPE_NBYTES = 1 << 20
MAX_SHOWN_CHOICES = 4


def takes(options: Sequence[Option]) -> Callable[[Command], Command]:
    """Add them to a command, which gets each under its own name."""

    def decorate(function: Command) -> Command:
        for entry in reversed(options):
            function = _click_option(entry)(function)
        return function

    return decorate


def _click_option(entry: Option) -> Callable[[Any], Any]:
    flags = entry.flag.split() or ["--" + entry.name.replace("_", "-")]
    settings: dict[str, Any] = {
        "help": entry.help,
        "metavar": entry.metavar or None,
        "group": entry.group,
        "required": entry.required,
    }
    if entry.kind == "flag":
        settings["is_flag"] = True
    elif entry.kind in {"list", "pairs", "paths"} and entry.name != "files_from":
        settings["multiple"] = True
        settings["help"] = f"{entry.help.removesuffix('.')} (repeatable)."
    else:
        settings["type"] = _type_of(entry)
        if not entry.required:  # whose default, even None, would be a value to click
            settings["default"] = entry.default
        settings["show_default"] = entry.kind in {"choice", "count"} and entry.default is not None
    if entry.kind == "choice" and len(entry.choices) > MAX_SHOWN_CHOICES and not entry.metavar:
        settings["metavar"] = "NAME"
    return click.option(*flags, entry.name, cls=GroupedOption, **settings)


def _type_of(entry: Option) -> click.ParamType[Any] | None:
    if entry.kind == "choice":
        return click.Choice(entry.choices)
    if entry.kind == "count":
        return _Count(entry.least, entry.most)
    return _TYPES.get(entry.kind)


class _Count(click.IntRange):
    name = "whole number"  # as in "'abc' is not a valid whole number"


class _Read(click.ParamType[Any]):
    """A value that a function makes of a text; what it raises as UsageError is wrong with the option."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._read(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


def _checked(parse: Callable[[str], object]) -> Callable[[str], str]:
    """The text itself: what it means is for the flow to say, which gets it as it was typed."""

    def check(text: str) -> str:
        parse(text)
        return text

    return check


def _arguments(text: str) -> dict[str, Any] | list[Any]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from error
    if not isinstance(arguments, (dict, list)):
        raise UsageError("a JSON object (keyword arguments) or array (positional ones)")
    return arguments


def _recipe(text: str) -> str:
    """A file's content, the name of a shipped recipe, or one in JSON."""
    if text in SHIPPED or text.lstrip().startswith("{"):
        return text
    if not os.path.isfile(text):
        raise UsageError(f"{text!r} is neither a file nor one of {', '.join(SHIPPED)}")
    with open(text, encoding="utf-8-sig") as file:  # some editors begin files with a mark
        try:
            content = file.read(MAX_RECIPE_NBYTES + 1)
        except UnicodeDecodeError as error:
            raise UsageError(f"{text} is not UTF-8 text") from error
    if not content.lstrip().startswith("{"):
        raise UsageError(f"{text} is not a JSON object")
    return content


def _storage_options(text: str) -> dict[str, Any]:
    """A JSON object, or `@FILE` that holds one. Errors never quote it: it may be a secret."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text()
        except OSError as error:
            raise UsageError(f"cannot read {text[1:]}: {error.strerror}") from error
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise UsageError("not a JSON object, nor @FILE with one in it")
    return options


_TYPES: dict[Kind, click.ParamType[Any]] = {
    "number": click.FLOAT,
    "share": _Read("share", parse_share),
    "size": _Read("size", _checked(parse_size)),
    "duration": _Read("duration", _checked(parse_duration)),
    "day": click.DateTime(["%Y-%m-%d"]),
    "json": _Read("JSON", _arguments),
    "recipe": _Read("recipe", _recipe),
    "storage": _Read("JSON", _storage_options),
}
"""How the text of an option of each kind is read; those of other kinds are taken as they are typed."""
