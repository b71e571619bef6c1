"""Which files below SOURCE alone a run looks at, as `--files-from` and `--retry-failed` say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ptbin.catalog.globs import root_of
from ptbin.catalog.named import parse_lines
from ptbin.catalog.request import RunRequest
from ptbin.errors import UsageError
from ptbin.history.failures import read_unconverted
from ptbin.history.records import read_rows
from ptbin.stores import NO_OPTIONS, Sides, place_of

__all__ = ["LAST", "with_named_files"]

LAST = "last"
"""Of `--retry-failed`: all that fails as the last run which looked at it left it."""


def with_named_files(request: RunRequest, asked: Mapping[str, Any], sides: Sides = NO_OPTIONS) -> RunRequest:
    """The request with the paths that it is to look at alone, where `asked` names some.

    `files_from` holds the paths themselves, or the path or URI of a file with one a line; `retry_failed` the
    id of a run of which what failed is tried again, or `LAST`.

    Raises:
        UsageError: parameters that contradict each other, no such run, or a file that cannot be read.
    """
    files_from, retry_failed = asked.get("files_from"), asked.get("retry_failed")
    if files_from is None and retry_failed is None:
        return request
    if request.include or (files_from is not None and retry_failed is not None):
        raise UsageError("only one of --include, --files-from and --retry-failed can say what to look at")
    if isinstance(files_from, str):
        files_from = parse_lines(place_of(files_from).read_bytes())
    if files_from is not None:
        return replace(request, named=tuple(files_from))
    root, dest = root_of(request.source, sides.source_at), sides.dest_at(request.dest)
    if retry_failed == LAST:
        rows = read_unconverted(dest)
        return replace(request, named=tuple(row.path for row in rows if row.is_failure and row.root == root))
    failed = [
        row["path"].removeprefix(f"{root.rstrip('/')}/")
        for row in read_rows(dest, str(retry_failed))
        if row.get("outcome") in ("rejected", "failed", "known")
    ]
    return replace(request, named=tuple(failed))
