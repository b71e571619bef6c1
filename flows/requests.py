"""From the parameters of a flow, or of its command, to the request that its plan is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flows.options import LAST
from flows.parsing import build_options, restore_options
from ptbin.catalog.globs import root_of
from ptbin.catalog.named import parse_lines
from ptbin.catalog.request import RunKind, RunRequest
from ptbin.errors import UsageError
from ptbin.options import ConvertOptions
from ptbin.stores import NO_OPTIONS, Sides, place_of

Text = str | os.PathLike[str]
"""How a place is given in Python; a flow's function gets a `str`."""


def convert_request(source: Text, dest: Text, asked: Mapping[str, Any]) -> RunRequest:
    """The request of `convert`, but for the files that it names (`with_named_files`)."""
    must_exist = asked["retry_failed"] is None
    return replace(_request("convert", source, dest, asked, build_options(asked)), must_exist=must_exist)


def restore_request(source: Text, dest: Text, asked: Mapping[str, Any]) -> RunRequest:
    """The request of `restore`. A model's code may have changed: what it made is never up to date."""
    options = restore_options(asked)
    request = _request("restore", source, dest, asked, options.conversion())
    return replace(request, distrust=options.model is not None)


def sync_request(source: Text, dest: Text, asked: Mapping[str, Any]) -> RunRequest:
    """The request of `sync`, whose `include` are files to be copied. Raises UsageError as `RunRequest`."""
    request = _request("sync", source, dest, asked, build_options(asked))
    return replace(
        request,
        include=(),
        copied=request.include,
        distrust=asked["checksum"],
        compares=asked["checksum"],
        immutable=asked["immutable"],
        deletes=asked["delete"],
        max_delete=asked["max_delete"],
        backup_dir=asked["backup_dir"],
    )


def _request(
    kind: RunKind, source: Text, dest: Text, asked: Mapping[str, Any], options: ConvertOptions
) -> RunRequest:
    return RunRequest(
        os.fspath(source),
        os.fspath(dest),
        options,
        kind,
        asked["naming"],
        tuple(asked["include"]),
        tuple(asked["exclude"]),
        copy_links=asked.get("copy_links", False),
    )


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
    from ptbin.history.failures import read_unconverted
    from ptbin.history.records import read_rows

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
