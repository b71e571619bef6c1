"""Calls that cannot work are refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ptbin.catalog.globs import split_glob
from ptbin.errors import NotFoundInStoreError, UsageError
from ptbin.stores import Store, open_store

__all__ = ["check_call"]


def check_call(
    source: str,
    dest: str | None,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    writes: bool = True,
) -> None:
    """Refuse a call that cannot work, before anything is written.

    Raises:
        UsageError: SOURCE missing or empty, DEST inside SOURCE or equal to it.
        StorageError: no access to either, no such bucket, DEST not writable.
    """
    root, pattern = split_glob(source, source_options)
    store, path = open_store(root, source_options)
    if store.is_directory(path):
        if next(iter(store.iter_objects(path)), None) is None:
            raise UsageError(f"{store.uri_of(path)}: nothing is there to convert")
    elif pattern is not None:
        raise UsageError(f"{store.uri_of(path)}: no such directory or prefix")
    else:
        try:
            store.stat(path)
        except NotFoundInStoreError as error:
            raise UsageError(str(error)) from error
    if dest is None:
        return
    dest_store, dest_path = open_store(dest, dest_options)
    _refuse_overlap(store, path, dest_store, dest_path, is_directory=store.is_directory(path))
    if writes:
        dest_store.check_writable(dest_path)


def _refuse_overlap(source: Store, path: str, dest: Store, dest_path: str, *, is_directory: bool) -> None:
    above, below = (_real_place(*place) for place in ((source, path), (dest, dest_path)))
    if above == below:
        raise UsageError(f"{below}: source and destination are the same place")
    if is_directory and below.startswith(f"{above}/"):
        raise UsageError(
            f"{below} lies inside the source {above}: the next run "
            "would take outputs for checkpoints; choose another place"
        )


def _real_place(store: Store, path: str) -> str:
    """The URI, local ones with symbolic links resolved: a link may lead from one place into the other."""
    return (os.path.realpath(path) if store.protocol == "file" else store.uri_of(path)).rstrip("/")
