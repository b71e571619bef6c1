"""`--files-from` and `--retry-failed`: files that a run is to look at alone."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator

import click

from flows.cli.help import GroupedCommand

__all__ = ["RetryingCommand", "holding_list"]

LAST = "last"
RUN_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
"""As `ptbin.runs.record.new_run_id` makes them."""


class RetryingCommand(GroupedCommand):
    """Takes the word after `--retry-failed` for a run only if it looks like one: SOURCE may come next."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words, taken = list(args), ""
        for at, word in enumerate(words):
            if word == "--retry-failed":
                following = "".join(words[at + 1 : at + 2])
                if RUN_ID.fullmatch(following) is None and following != LAST:
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


@contextlib.contextmanager
def holding_list(files_from: str | None) -> Iterator[str | None]:
    """The same, with standard input as a file that lasts as long as the context."""
    if files_from != "-":
        yield files_from
        return
    with tempfile.NamedTemporaryFile(prefix="ptbin-files-", suffix=".txt") as file:
        file.write(sys.stdin.buffer.read())
        file.flush()
        yield file.name
