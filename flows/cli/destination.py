"""What DEST means: one file, by a suffix that the command writes, or a directory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptbin.errors import PtbinError, UsageError

if TYPE_CHECKING:
    from ptbin.stores import Place

__all__ = ["leaving_no_empty_folders", "one_file", "refuse_lost", "refuse_one_file"]

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
    suffix = _suffix_of_file(dest, storage_options).lower()
    if not suffix:
        return None
    if suffix in known:
        return suffix
    if suffix in elsewhere:
        raise UsageError(f"DEST ends in {suffix}, which convert makes: ptbin convert SOURCE {dest}")
    own = _own_link(dest)
    renamed, folder = (dest.replace(own, text, 1) for text in (own[: -len(suffix)] + known[0], f"{own}/"))
    raise UsageError(
        f"DEST ends in {suffix}: a file ends in {', '.join(known)} ({renamed}); for a directory "
        f"write {folder}"
    )


def refuse_one_file(dest: str, storage_options: Mapping[str, Any], command: str) -> None:
    """Of commands that fill a directory.

    Raises:
        UsageError: DEST looks like one file and is not a directory.
    """
    if dest == "-":
        raise UsageError(f"DEST is -, and {command} fills a directory: name one")
    if suffix := _suffix_of_file(dest, storage_options):
        raise UsageError(
            f"DEST ends in {suffix}, and {command} fills a directory: write {dest}/ if it is to have "
            "that name"
        )


def refuse_lost(name: str, place: str) -> None:
    """Of what is written to: what lies in a process's memory ends with the command.

    Raises:
        UsageError: `place` is in memory, behind a cache or in an archive (`zip://x::memory://y.zip`) as well.
    """
    if any(link.partition("://")[0].lower() == "memory" for link in place.split("::")):
        raise UsageError(
            f"{name} is {place}, the memory of this process, which ends with the command: write to a "
            "directory (/dev/shm/... is in memory and stays), or call ptbin from Python"
        )


@contextlib.contextmanager
def leaving_no_empty_folders(dest: Place) -> Iterator[None]:
    """Where the context ends with an error of ours, empty folders that it made at a local DEST go again."""
    if not dest.is_local:
        yield
        return
    root = Path(dest.path)
    made = [
        folder
        for folder in (root / "_ptbin" / "leases", root / "_ptbin", root, *root.parents)
        if not folder.exists()
    ]
    try:
        yield
    except PtbinError:
        with contextlib.suppress(OSError):  # it is missing, or not empty: something was written
            for folder in made:
                folder.rmdir()
        raise


def _own_link(dest: str) -> str:
    """Of a chained URL (`zip://a/x.bin::s3://bucket/y.zip`) the link that the path belongs to."""
    links = dest.split("::")
    return next((link for link in links if "://" in link), links[-1])


def _suffix_of_file(dest: str, storage_options: Mapping[str, Any]) -> str:
    """The suffix of DEST where it looks like one file; empty where it does not, or is a directory."""
    from ptbin.stores import place_of

    refuse_lost("DEST", dest)
    found = _SUFFIX.search(_own_link(dest))
    return "" if found is None or place_of(dest, storage_options).is_directory() else found[0]
