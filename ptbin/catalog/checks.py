"""Calls that cannot work are refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ptbin.catalog.globs import split_glob
from ptbin.errors import NotFoundInStoreError, UsageError
from ptbin.stores import Store, WatchQuietly, open_store

__all__ = ["check_call", "check_mirror", "real_place"]


def check_mirror(
    source: str,
    dest: str,
    *,
    delete: bool = False,
    backup_dir: str | None = None,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    writes: bool = True,
) -> None:
    """As `check_call`, and refuse what would make a mirror delete or hide what it should not.

    Raises:
        UsageError: as `check_call`; SOURCE inside DEST; a backup place that lies in one of them, or one of
            them in it; deletions where SOURCE is not the whole of a directory or prefix.
        StorageError: as `check_call`.
    """
    check_call(source, dest, source_options=source_options, dest_options=dest_options, writes=writes)
    root, pattern = split_glob(source, source_options)
    store, path = open_store(root, source_options)
    above, below = real_place(*open_store(dest, dest_options)), real_place(store, path)
    if _lies_in(below, above):
        raise UsageError(
            f"the source {below} lies inside the destination {above}: what a mirror may delete and what it "
            "reads must be apart; choose another place"
        )
    if delete and (pattern is not None or not store.is_directory(path)):
        raise UsageError(
            f"{source}: --delete needs a directory or prefix as SOURCE, for what else lies in DEST would "
            "count as gone; name the folder, and leave files out with --exclude"
        )
    if backup_dir is None:
        return
    own = real_place(*open_store(backup_dir, dest_options))
    for name, place in (("SOURCE", below), ("DEST", above)):
        if own == place or _lies_in(own, place) or _lies_in(place, own):
            raise UsageError(f"the backup place and {name} lie in one another: {own}, {place}")


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
        if next(iter(store.iter_objects(path, WatchQuietly())), None) is None:
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
    above, below = (real_place(*place) for place in ((source, path), (dest, dest_path)))
    if above == below:
        raise UsageError(f"{below}: source and destination are the same place")
    if is_directory and _lies_in(below, above):
        raise UsageError(
            f"{below} lies inside the source {above}: the next run "
            "would take outputs for checkpoints; choose another place"
        )


def _lies_in(below: str, above: str) -> bool:
    return below.startswith(f"{above}/")


def real_place(store: Store, path: str) -> str:
    """The URI, local ones with symbolic links resolved: a link may lead from one place into the other."""
    return (os.path.realpath(path) if store.protocol == "file" else store.uri_of(path)).rstrip("/")
