"""Which names files and folders may have: what every log, manifest and checksum list can carry. Pure."""

from __future__ import annotations

import functools
import unicodedata

_NO_NAME_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
"""Control characters, separators of lines and paragraphs, and what bytes come as that are not UTF-8."""


@functools.lru_cache(maxsize=4096)
def bad_name(name: str) -> str:
    """Why a name, of a file or a folder, cannot be used for an output's; empty where it can."""
    if name.isprintable():
        return ""
    found = {unicodedata.category(character) for character in name} & _NO_NAME_CATEGORIES
    if "Cs" in found:
        return "is not UTF-8"
    return "has a line break or another control character in it" if found else ""


def is_plain_path(path: str) -> bool:
    """Whether a relative path leads straight down: no empty parts, `.`, `..`, backslashes or NUL."""
    return {"", ".", ".."}.isdisjoint(path.split("/")) and {"\\", "\0"}.isdisjoint(path)


def is_plain_name(name: str) -> bool:
    """Whether it is a plain path of one part."""
    return "/" not in name and is_plain_path(name)


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: it holds no lone surrogate, as bytes that are no text come as."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def visible(text: str) -> str:
    """`text` with all that does not print as itself escaped: what breaks lines or turns their direction."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown_path(path: str) -> str:
    r"""A path as text on one line that any log, page and JSON file takes.

    What is not UTF-8 in it becomes `\xff`, a line break `\n`.
    """
    if not is_unicode(path):
        path = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if path.isprintable():
        return path
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _NO_NAME_CATEGORIES else c
        for c in path
    )
