"""`--files-from` and `--retry-failed`: files that a run is to look at alone."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

import click

from flows.cli.help import GroupedCommand
from flows.cli.shared_options import Shared

__all__ = ["RetryingCommand", "holding_list", "named_paths"]

LAST = "last"
RUN_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
"""As `ptbin.runs.record.new_run_id` makes them."""


class RetryingCommand(GroupedCommand):
    """Takes the word after `--retry-failed` for a run only if it looks like one: SOURCE may come next."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        for at, word in enumerate(words):
            if word == "--retry-failed":
                following = words[at + 1 : at + 2]
                if not following or not (RUN_ID.fullmatch(following[0]) or following[0] == LAST):
                    words[at] = f"--retry-failed={LAST}"
        return super().parse_args(ctx, words)


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


def named_paths(
    source: str,
    dest: str,
    *,
    files_from: str | None,
    retry_failed: str | None,
    include: Sequence[str],
    shared: Shared,
) -> list[str] | None:
    """What a run will look at alone, found out early: a wrong call shall cost nothing.

    Raises:
        UsageError, StorageError: as `flows.selection.named_files`.
    """
    from flows.selection import named_files
    from ptbin.catalog.globs import root_of

    return named_files(
        dest,
        root_of(source, shared.source_options),
        files_from=files_from,
        retry_failed=retry_failed,
        include=include,
        dest_options=shared.dest_options,
    )
