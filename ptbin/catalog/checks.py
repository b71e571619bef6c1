"""Calls that cannot work are refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ptbin.catalog.globs import split_glob
from ptbin.catalog.request import RunRequest
from ptbin.errors import NotFoundInStoreError, UsageError
from ptbin.stores import Place, WatchQuietly, place_of
from ptbin.values.names import is_unicode, shown_path

__all__ = ["check_call", "check_mirror", "check_request", "real_uri", "refuse_bytes"]


def check_request(request: RunRequest, *, writes: bool = True, **sides: Any) -> None:
    """As `check_mirror` for a mirror, else as `check_call`; `sides`: `source_options` and `dest_options`."""
    if request.kind == "sync":
        sides |= {"delete": request.deletes, "backup_dir": request.backup_dir}
    check = check_mirror if request.kind == "sync" else check_call
    check(request.source, request.dest, writes=writes, **sides)


def check_mirror(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    delete: bool = False,
    backup_dir: str | os.PathLike[str] | None = None,
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
    place = place_of(root, source_options)
    above, below = real_uri(place_of(dest, dest_options)), real_uri(place)
    if _lies_in(below, above):
        raise UsageError(
            f"the source {below} lies inside the destination {above}: what a mirror may delete and what it "
            "reads must be apart; choose another place"
        )
    if delete and (pattern is not None or not place.is_directory()):
        raise UsageError(
            f"{source}: --delete needs a directory or prefix as SOURCE, for what else lies in DEST would "
            "count as gone; name the folder, and leave files out with --exclude"
        )
    if backup_dir is None:
        return
    own = real_uri(place_of(backup_dir, dest_options))
    for name, other in (("SOURCE", below), ("DEST", above)):
        if own == other or _lies_in(own, other) or _lies_in(other, own):
            raise UsageError(f"the backup place and {name} lie in one another: {own}, {other}")


def check_call(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str] | None,
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
    root, pattern = split_glob(source, source_options)
    place = place_of(root, source_options)
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
    end = place_of(dest, dest_options)
    refuse_bytes(end)
    _refuse_overlap(place, end, is_directory=is_directory)
    if writes:
        end.check_writable()


def refuse_bytes(place: Place) -> None:
    """Records, the index and Prefect keep places as text. Raises UsageError where a path is not UTF-8."""
    if not is_unicode(place.path):
        raise UsageError(f"{shown_path(place.uri)}: the path is not UTF-8; rename the folder first")


def _refuse_overlap(source: Place, dest: Place, *, is_directory: bool) -> None:
    above, below = real_uri(source), real_uri(dest)
    if above == below:
        raise UsageError(f"{below}: source and destination are the same place")
    if is_directory and _lies_in(below, above):
        raise UsageError(
            f"{below} lies inside the source {above}: the next run "
            "would take outputs for checkpoints; choose another place"
        )


def _lies_in(below: str, above: str) -> bool:
    return below.startswith(f"{above}/")


def real_uri(place: Place) -> str:
    """The URI without a slash at its end, links in local paths resolved.

    A link may lead from one place into the other.
    """
    return (os.path.realpath(place.path) if place.is_local else place.uri).rstrip("/")
