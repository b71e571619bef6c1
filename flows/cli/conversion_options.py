"""How checkpoints become outputs: the options that `convert`, `sync` and `migrate` share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ptbin.values.dtypes import CAST_NAMES

__all__ = ["content_options", "conversion_options", "recipe_option", "split_content", "split_wishes"]

Command = TypeVar("Command", bound=Callable[..., Any])


def conversion_options(function: Command) -> Command:
    """Add them to a command; `split_wishes` takes them."""
    return placing_options(content_options(function))


def placing_options(function: Command) -> Command:
    """How outputs are called."""
    decorators = [
        click.option(
            "--layout",
            type=click.Choice(["mirror", "hf"]),
            default="mirror",
            show_default=True,
            help="hf: names that transformers looks for, config and tokenizer copied along.",
        ),
        click.option(
            "--naming",
            type=click.Choice(["replace", "append"]),
            default="replace",
            show_default=True,
            help="last.ckpt becomes last.bin, or last.ckpt.bin.",
        ),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def content_options(function: Command) -> Command:
    """What is in them, and how far it is proven; `split_content` takes these."""
    decorators = [
        click.option(
            "--format",
            "output_format",
            type=click.Choice(["torch", "raw", "safetensors"]),
            default="torch",
            show_default=True,
            help="torch: as pytorch_model.bin; raw: bare tensors and a JSON index; safetensors.",
        ),
        click.option(
            "--dtype", type=click.Choice(CAST_NAMES), metavar="NAME", help="Cast floating tensors, as torch."
        ),
        click.option(
            "--max-shard-size", metavar="SIZE", help="Cut larger outputs into shards: 5GB, 500MiB, ..."
        ),
        click.option("--tie-by-value", is_flag=True, help="Store equal matrices once, as tied."),
        recipe_option(),
        click.option(
            "--parts", is_flag=True, help="Take one part of a checkpoint (a rank's file, a shard) as it is."
        ),
        click.option(
            "--select",
            multiple=True,
            metavar="PATH",
            help="The state dict to take, as `inspect` lists them (repeatable: their union).",
        ),
        click.option("--flatten", is_flag=True, help="One state dict of nested ones, names joined by dots."),
        click.option("--split", is_flag=True, help="Each state dict as an output of its own: NAME.PATH.bin."),
        click.option(
            "--strip-prefix", metavar="P", help="Take P off all names; auto: module. and _orig_mod."
        ),
        click.option(
            "--rename", multiple=True, metavar="OLD=NEW", help="Regex replacement on names (repeatable)."
        ),
        click.option(
            "--drop", multiple=True, metavar="REGEX", help="Leave out names that match (repeatable)."
        ),
        click.option(
            "--verify",
            type=click.Choice(["none", "checksum", "load"]),
            default="checksum",
            show_default=True,
            help="Proof before an output counts: none, read it back, or also open it with torch.",
        ),
        click.option(
            "--file-digest",
            type=click.Choice(["sha256", "none"]),
            default="sha256",
            show_default=True,
            help="none: huge files proven by their tensors' digests, on all cores; not for sha256sum -c.",
        ),
        click.option(
            "--on-unsafe",
            type=click.Choice(["reject", "extract"]),
            default="reject",
            show_default=True,
            help="Pickles that can only be meant to run code: refuse, or take the weights (running nothing).",
        ),
        click.option(
            "--provenance",
            is_flag=True,
            help="Beside each output, where it comes from (in-toto, SLSA); reads sources whole.",
        ),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


MAX_RECIPE_NBYTES = 1 << 20


def recipe_option() -> Callable[[Any], Any]:
    """`--recipe`: a file's content, or the name of a shipped one."""
    return click.option(
        "--recipe",
        metavar="NAME|FILE",
        callback=_recipe,
        help="Other names and cuts: llama-hf, moe-fuse, moe-split, ..., or a file (docs/parts.md).",
    )


def _recipe(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    del context, option
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


_CONTENT = (
    *("dtype", "max_shard_size", "tie_by_value", "recipe", "parts"),
    *("select", "flatten", "split", "strip_prefix"),
    *("rename", "drop"),
    *("on_unsafe", "verify", "file_digest", "provenance"),
)


def split_content(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters of `build_options` that `content_options` added."""
    wishes = {name: values.pop(name) for name in _CONTENT}
    wishes["format"] = values.pop("output_format")
    for name in ("rename", "drop", "select"):
        wishes[name] = list(wishes[name])
    return wishes


def split_wishes(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The naming, and the parameters of `build_options`."""
    wishes = split_content(values)
    wishes["layout"] = values.pop("layout")
    return values.pop("naming"), wishes
