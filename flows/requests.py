"""From the parameters of a flow, or of its command, to the request that its plan is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flows.wishes import build_options
from ptbin.catalog.request import RunRequest
from ptbin.restoring.options import RestoreOptions

__all__ = ["convert_request", "restore_request", "sync_request"]


def convert_request(
    source: str, dest: str, asked: Mapping[str, Any], named: Sequence[str] | None = None
) -> RunRequest:
    """Of `convert`; `named` as `flows.selection.named_files` found it."""
    return RunRequest(
        source,
        dest,
        build_options(asked),
        naming=asked["naming"],
        include=tuple(asked["include"]),
        exclude=tuple(asked["exclude"]),
        copy_links=asked["copy_links"],
        named=tuple(named) if named is not None else None,
        must_exist=asked["retry_failed"] is None,
    )


def sync_request(source: str, dest: str, asked: Mapping[str, Any]) -> RunRequest:
    """Of `sync`. Raises UsageError as `build_options` and `RunRequest`."""
    return RunRequest(
        source,
        dest,
        build_options(asked),
        "sync",
        asked["naming"],
        exclude=tuple(asked["exclude"]),
        copied=tuple(asked["include"]),
        copy_links=asked["copy_links"],
        distrust=asked["checksum"],
        compares=asked["checksum"],
        immutable=asked["immutable"],
        deletes=asked["delete"],
        max_delete=asked["max_delete"],
        backup_dir=asked["backup_dir"],
    )


def restore_request(source: str, dest: str, asked: Mapping[str, Any], options: RestoreOptions) -> RunRequest:
    """Of `restore`. A model's code may have changed: what it made is never up to date."""
    return RunRequest(
        source,
        dest,
        options.conversion(),
        "restore",
        asked["naming"],
        include=tuple(asked["include"]),
        exclude=tuple(asked["exclude"]),
        distrust=options.model is not None,
    )
