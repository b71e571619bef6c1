"""Which files below SOURCE alone a run looks at, as `--files-from` and `--retry-failed` say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptbin.catalog.named import parse_lines
from ptbin.errors import UsageError
from ptbin.history.failures import read_unconverted
from ptbin.history.records import read_rows
from ptbin.stores import place_of

__all__ = ["LAST", "named_files"]

LAST = "last"
"""Of `--retry-failed`: all that fails as the last run which looked at it left it."""


def named_files(
    dest: str,
    root: str,
    *,
    files_from: str | Sequence[str] | None,
    retry_failed: str | None,
    include: Sequence[str],
    dest_options: Mapping[str, Any] | None = None,
) -> list[str] | None:
    """Paths below SOURCE that a run is to look at alone; None: it looks at everything.

    Args:
        root: URI of SOURCE.
        files_from: the paths themselves, or the path or URI of a file with one a line.
        retry_failed: the id of a run of which what failed is tried again, or `LAST`.

    Raises:
        UsageError: parameters that contradict each other, no such run, or a file that cannot be read.
    """
    if files_from is None and retry_failed is None:
        return None
    if include or (files_from is not None and retry_failed is not None):
        raise UsageError("only one of --include, --files-from and --retry-failed can say what to look at")
    if isinstance(files_from, str):
        return parse_lines(place_of(files_from).read_bytes())
    if files_from is not None:
        return list(files_from)
    if retry_failed == LAST:
        rows = read_unconverted(place_of(dest, dest_options))
        return [row.path for row in rows if row.is_failure and row.root == root]
    found = read_rows(place_of(dest, dest_options), str(retry_failed))
    failed = [row["path"] for row in found if row.get("outcome") in ("rejected", "failed", "known")]
    return [path.removeprefix(f"{root.rstrip('/')}/") for path in failed]
