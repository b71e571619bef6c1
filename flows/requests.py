"""From the parameters of a flow, or of its command, to the request that its plan is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flows.parsing import build_options, restore_options
from ptbin.catalog.request import RunRequest

__all__ = ["convert_request", "restore_request", "sync_request"]

Text = str | os.PathLike[str]


def convert_request(source: Text, dest: Text, asked: Mapping[str, Any]) -> RunRequest:
    """The request of `convert`, but for the files that it names (`flows.selection`)."""
    return RunRequest(
        os.fspath(source),
        os.fspath(dest),
        build_options(asked),
        naming=asked["naming"],
        include=tuple(asked["include"]),
        exclude=tuple(asked["exclude"]),
        copy_links=asked["copy_links"],
        must_exist=asked["retry_failed"] is None,
    )


def sync_request(source: Text, dest: Text, asked: Mapping[str, Any]) -> RunRequest:
    """The request of `sync`. Raises UsageError as `build_options` and `RunRequest`."""
    return RunRequest(
        os.fspath(source),
        os.fspath(dest),
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


def restore_request(source: Text, dest: Text, asked: Mapping[str, Any]) -> RunRequest:
    """The request of `restore`. A model's code may have changed: what it made is never up to date."""
    options = restore_options(asked)
    return RunRequest(
        os.fspath(source),
        os.fspath(dest),
        options.conversion(),
        "restore",
        asked["naming"],
        include=tuple(asked["include"]),
        exclude=tuple(asked["exclude"]),
        distrust=options.model is not None,
    )
