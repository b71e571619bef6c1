"""Calls that cannot work are refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ptbin.catalog.globs import split_glob
from ptbin.catalog.request import RunRequest
from ptbin.errors import NotFoundInStoreError, UsageError
from ptbin.stores import NO_OPTIONS, Place, Sides, WatchQuietly, Where, place_of
from ptbin.values.names import is_unicode, shown_path


def check_request(request: RunRequest, sides: Sides = NO_OPTIONS, *, writes: bool = True) -> None:
    """As `check_call`, and for a mirror refuse what would make it delete or hide what it should not.

    Raises:
        UsageError: as `check_call`; of a mirror: SOURCE inside DEST; a backup place that lies in one of them,
            or one of them in it; deletions where SOURCE is not the whole of a directory or prefix.
        StorageError: as `check_call`.
    """
    place, pattern = split_glob(request.source, sides.source_at)
    dest = sides.dest_at(request.dest)
    _check(place, pattern, dest, writes=writes)
    if request.kind != "sync":
        return
    if _lies_in(place, dest):
        raise UsageError(
            f"the source {real_uri(place)} lies inside the destination {real_uri(dest)}: what a mirror may "
            "delete and what it reads must be apart; choose another place"
        )
    if request.deletes and (pattern is not None or not place.is_directory()):
        raise UsageError(
            f"{request.source}: --delete needs a directory or prefix as SOURCE, for what else lies in DEST "
            "would count as gone; name the folder, and leave files out with --exclude"
        )
    if request.backup_dir is None:
        return
    own = sides.dest_at(request.backup_dir)
    for name, other in (("SOURCE", place), ("DEST", dest)):
        refuse_nested(f"the backup place and {name}", own, other)


def check_call(
    source: Where,
    dest: Where | None,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    writes: bool = True,
) -> None:
    """Refuse a call that cannot work, before anything is written.

    Raises:
        UsageError: SOURCE missing or empty, DEST inside SOURCE or equal to it, a path that is not UTF-8.
        StorageError: no access to either, no such bucket, DEST not writable.
    """
    place, pattern = split_glob(source, partial(place_of, storage_options=source_options))
    _check(place, pattern, place_of(dest, dest_options) if dest is not None else None, writes=writes)


def _check(place: Place, pattern: str | None, dest: Place | None, *, writes: bool) -> None:
    is_directory = place.is_directory()
    if is_directory:
        refuse_bytes(place)
        if next(iter(place.iter_objects(WatchQuietly())), None) is None:
            raise UsageError(f"{place.uri}: nothing is there to convert")
    elif pattern is not None:
        raise UsageError(f"{place.uri}: no such directory or prefix")
    else:
        try:
            place.stat()
        except NotFoundInStoreError as error:
            raise UsageError(str(error)) from error
    if dest is None:
        return
    refuse_bytes(dest)
    _refuse_overlap(place, dest, is_directory=is_directory)
    if writes:
        dest.check_writable()


def refuse_bytes(place: Place) -> None:
    """Records, the index and Prefect keep places as text. Raises UsageError where a path is not UTF-8."""
    if not is_unicode(place.path):
        raise UsageError(f"{shown_path(place.uri)}: the path is not UTF-8; rename the folder first")


def refuse_nested(what: str, one: Place, other: Place) -> None:
    """Raises UsageError where two directories are the same one, or one of them lies in the other."""
    if _is_same(one, other) or _lies_in(one, other) or _lies_in(other, one):
        raise UsageError(f"{what} lie in one another: {real_uri(one)}, {real_uri(other)}")


def _refuse_overlap(source: Place, dest: Place, *, is_directory: bool) -> None:
    if _is_same(source, dest):
        raise UsageError(f"{real_uri(dest)}: source and destination are the same place")
    if is_directory and _lies_in(dest, source):
        raise UsageError(
            f"{real_uri(dest)} lies inside the source {real_uri(source)}: the next run "
            "would take outputs for checkpoints; choose another place"
        )


def _is_same(one: Place, other: Place) -> bool:
    return real_uri(one) == real_uri(other) or _is_mounted_twice(one, [real_uri(other)])


def _lies_in(below: Place, above: Place) -> bool:
    uri = real_uri(below)
    if uri.startswith(f"{real_uri(above)}/"):
        return True
    return below.is_local and _is_mounted_twice(above, map(str, Path(uri).parents))


def _is_mounted_twice(place: Place, paths: Iterable[str]) -> bool:
    """Whether one of the paths is the same local folder by another name, as a bind mount has it."""
    if not place.is_local or not os.path.isdir(place.path):
        return False
    return any(os.path.isdir(path) and os.path.samefile(place.path, path) for path in paths)


def real_uri(place: Place) -> str:
    """The URI without a slash at its end, links in local paths resolved.

    A link may lead from one place into the other.
    """
    return (os.path.realpath(place.path) if place.is_local else place.uri).rstrip("/")
