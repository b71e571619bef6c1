"""Globs on paths below SOURCE, and SOURCE itself as one. A pattern means what it means in a shell."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import re
from collections.abc import Callable, Sequence

from ptbin.errors import StorageError
from ptbin.stores import Place, Where

_GLOB = re.compile(r"[*?\[]")


def matches(path: str, pattern: str) -> bool:
    """Glob on a relative path: `**` crosses folders, a pattern without a slash matches names at any depth."""
    if "/" not in pattern:
        return fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern)
    return _compiled(pattern).fullmatch(path) is not None


def is_excluded(path: str, globs: Sequence[str]) -> bool:
    """Whether one of the globs takes `path` away, or a folder it lies in (`debug`, `debug/`, `debug/**`)."""
    if not globs:
        return False
    if path.endswith("/"):
        return _folder_is_excluded(path.rstrip("/"), tuple(globs))
    above = path.rpartition("/")[0]
    return any(matches(path, glob) for glob in globs) or _folder_is_excluded(above, tuple(globs))


@functools.lru_cache(maxsize=4096)
def _folder_is_excluded(folder: str, globs: tuple[str, ...]) -> bool:
    if not folder:
        return False
    if any(matches(folder, glob.rstrip("/")) or matches(f"{folder}/", glob) for glob in globs):
        return True
    return _folder_is_excluded(folder.rpartition("/")[0], globs)


_PIECE = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^]/]*\]|.", re.DOTALL)
"""A class is closed in its own part of the path; a bracket right at its beginning is a member."""
_MEANINGS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


@functools.lru_cache(maxsize=512)
def _compiled(pattern: str) -> re.Pattern[str]:
    # fnmatch knows all about classes: "(?s:" + class + ")\\Z" is what it makes of one.
    pieces = [
        _MEANINGS.get(piece) or (fnmatch.translate(piece)[4:-3] if piece[1:] else re.escape(piece))
        for piece in _PIECE.findall(pattern)
    ]
    return re.compile("".join(pieces), re.DOTALL)


def split_glob(source: Where, source_at: Callable[[Where], Place]) -> tuple[Place, str | None]:
    """SOURCE up to the first wildcard's folder, and the pattern below it; (SOURCE, None) without wildcard.

    An existing path wins over its reading as a pattern, and a place is not read as one.
    """
    place = source_at(source)
    if isinstance(source, Place):
        return place, None
    source = os.fspath(source)
    if _GLOB.search(source) is None:
        return place, None
    with contextlib.suppress(StorageError, ValueError):
        if place.is_directory():
            return place, None
        place.stat()
        return place, None
    fixed: list[str] = []
    parts = source.split("/")
    while parts and _GLOB.search(parts[0]) is None:
        fixed.append(parts.pop(0))
    root = "/".join(fixed) or ("/" if source.startswith("/") else ".")
    pattern = "/".join(parts)
    # A leading slash anchors the pattern at the listing's root, as a shell's glob is.
    return source_at(root), f"/{pattern}"


def root_of(source: Where, source_at: Callable[[Where], Place]) -> str:
    """URI of the place that paths below SOURCE are relative to: the same however SOURCE is written."""
    return split_glob(source, source_at)[0].uri
