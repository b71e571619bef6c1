"""What DEST means: one file, by a suffix that the command writes, or a directory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ptbin.errors import UsageError

__all__ = ["one_file", "refuse_one_file"]

_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


def one_file(
    dest: str, known: Sequence[str], storage_options: Mapping[str, Any], *, elsewhere: Sequence[str] = ()
) -> str | None:
    """The suffix, in small letters, where DEST names one file; None where it is a directory.

    Args:
        known: suffixes of the files that the command writes.
        elsewhere: suffixes of what `ptbin convert` makes, where that is another command.

    Raises:
        UsageError: any other suffix, or `-`; it says what to write instead.
    """
    if dest == "-":
        raise UsageError(
            "DEST is -: an output is a file with its manifest next to it; name a file or a directory"
        )
    found = _SUFFIX.search(dest)
    if found is None or _is_directory(dest, storage_options):
        return None
    suffix = found[0].lower()
    if suffix in known:
        return suffix
    if suffix in elsewhere:
        raise UsageError(f"DEST ends in {suffix}, which convert makes: ptbin convert SOURCE {dest}")
    whole = dest[: -len(suffix)]
    raise UsageError(
        f"DEST ends in {suffix}: a file ends in {', '.join(known)} ({whole}{known[0]}); for a directory "
        f"write {dest}/"
    )


def refuse_one_file(dest: str, storage_options: Mapping[str, Any], command: str) -> None:
    """Of commands that fill a directory.

    Raises:
        UsageError: DEST looks like one file and is not a directory.
    """
    if dest == "-":
        raise UsageError(f"DEST is -, and {command} fills a directory: name one")
    found = _SUFFIX.search(dest)
    if found is not None and not _is_directory(dest, storage_options):
        raise UsageError(
            f"DEST ends in {found[0]}, and {command} fills a directory: write {dest}/ if it is to have "
            "that name"
        )


def _is_directory(dest: str, storage_options: Mapping[str, Any]) -> bool:
    from ptbin.stores import open_store

    store, path = open_store(dest, storage_options)
    return store.is_directory(path)
