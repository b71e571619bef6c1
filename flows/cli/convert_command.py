"""`ptbin convert`: one checkpoint by the engine directly, or a whole store through the Prefect flow."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import click

from flows.cli.carrying_out import carry_out
from flows.cli.command import Shared, command, dry_run_option
from flows.cli.destination import one_file
from flows.cli.help import GroupedCommand
from flows.options import CONVERT, LAST
from ptbin.errors import UsageError
from ptbin.runs.run_ids import OWN_FORM

EPILOG = """\b
Examples:
  ptbin convert run1/last.ckpt last.bin
  ptbin convert checkpoints/ weights/ --dry-run
  ptbin convert checkpoints/ weights/ --include 'run*/last.ckpt' --workers 4
  ptbin convert s3://models/checkpoints s3://models/weights --json > summary.json
  ptbin convert ema.pt ema.bin --select ema_state_dict --strip-prefix auto
  ptbin convert runs/step-900 model.safetensors --format safetensors --dtype bfloat16
  ptbin convert checkpoints/ hub/ --layout hf --max-shard-size 5GB
  ptbin convert in.pt s3://models/in.bin --dest-options @minio.json
  ptbin convert s3://training/runs s3://models/weights --retry-failed
  ls -t checkpoints | head | ptbin convert checkpoints/ weights/ --files-from -

SOURCE and DEST are local paths or any fsspec URL. One checkpoint becomes the file DEST if that ends in
.bin or .safetensors, else a file in DEST. Everything else (a directory, a prefix, a quoted glob) is converted
below DEST through Prefect: on the server of PREFECT_API_URL, or on one that is started for the run. A rerun
converts only what is new or changed.

Exit status: 0 all converted or up to date; 1 some were rejected or failed;
2 the call was wrong, nothing was written; 130 interrupted."""


class _RetryingCommand(GroupedCommand):
    """Takes the word after `--retry-failed` for a run only if it looks like one: SOURCE may come next."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words, taken = list(args), ""
        for at, word in enumerate(words):
            if word == "--retry-failed":
                following = "".join(words[at + 1 : at + 2])
                if OWN_FORM.fullmatch(following) is None and following != LAST:
                    words[at], taken = f"--retry-failed={LAST}", following
        try:
            return super().parse_args(ctx, words)
        except click.UsageError as error:
            if not taken or "extra argument" not in error.message:
                raise
            raise click.UsageError(
                f"--retry-failed {taken}: that is not the id of a run as ptbin makes them, so it was taken "
                f"for a place; `ptbin runs DEST` lists the runs, and --retry-failed={taken} takes any name",
                ctx,
            ) from error


@command("convert", ["source", "dest"], (*CONVERT, dry_run_option()), EPILOG, cls=_RetryingCommand)
def convert_command(source: str, dest: str, asked: dict[str, Any], shared: Shared) -> int:
    """Convert SOURCE, one checkpoint or a whole store of them, into DEST."""
    asked["files_from"] = click.get_current_context().with_resource(_holding_list(asked["files_from"]))
    names_one = _names_one(dest, asked, shared)
    import ptbin
    from flows.requests import convert_request

    request = convert_request(source, dest, asked)
    make = partial(ptbin.convert, options=request.making)
    return carry_out(request, asked, shared, names_one=names_one, make=make)


@contextlib.contextmanager
def _holding_list(files_from: str | None) -> Iterator[str | None]:
    """The same, with standard input as a file that lasts as long as the context."""
    if files_from != "-":
        yield files_from
        return
    with tempfile.NamedTemporaryFile(prefix="ptbin-files-", suffix=".txt") as file:
        file.write(sys.stdin.buffer.read())
        file.flush()
        yield file.name


def _names_one(dest: str, asked: dict[str, Any], shared: Shared) -> bool:
    """Whether DEST is the name of one output; where it is, its suffix settles a format that was left open.

    Raises:
        UsageError: a suffix that convert does not write, or that contradicts `--format`.
    """
    from ptbin.writing.formats import OUTPUT_SUFFIXES

    suffix = one_file(dest, tuple(dict.fromkeys(OUTPUT_SUFFIXES.values())), shared.dest_options)
    if suffix is None:
        return False
    formats = [name for name, its_suffix in OUTPUT_SUFFIXES.items() if its_suffix == suffix]
    if asked["format"] not in formats:
        origin = click.get_current_context().get_parameter_source("format")
        if origin is not None and origin.name != "DEFAULT":
            raise UsageError(
                f"DEST ends in {suffix}, which --format {asked['format']} is not called: leave --format "
                "out, or name another DEST"
            )
        asked["format"] = formats[0]
    return True
