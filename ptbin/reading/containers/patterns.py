"""Regular expressions that a checkpoint brings along: kept only where matching them cannot take long.

Python's `re` tries every way to match; a hostile expression makes it try for years. Expressions of names need
little: what repeats a group, or repeats without bound more than a few times, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ptbin.errors import UnsupportedFormatError
from ptbin.merging.expressions import bare

MAX_LENGTH = 1000
MAX_REPEATS = 3
MAX_NAME = 400
_GROUP_REPEATED = re.compile(r"\)[*+{]")
_REPEAT = re.compile(r"[*+]|\{\d+,\d*\}")


class Patterns:
    """Expressions of one list, matched from the beginning of a name (`re.match`).

    Those of exactly one name (`^name$`, as AutoTP writes them) are looked up and not tried one by one.
    """

    def __init__(self, texts: Any, where: str) -> None:
        """Raises UnsupportedFormatError: something that is not an expression, or one that may take long."""
        self._exact: set[str] = set()
        self._others: list[tuple[str, re.Pattern[str]]] = []
        for text in texts if isinstance(texts, Iterable) and not isinstance(texts, str) else ():
            if not isinstance(text, str) or len(text) > MAX_LENGTH:
                raise UnsupportedFormatError(f"{where}: {str(text)[:100]!r} is not a pattern of names")
            if text.startswith("^") and text.endswith("$") and re.escape(_plain(text[1:-1])) == text[1:-1]:
                self._exact.add(text)
            else:
                self._others.append((text, _compiled(text, where)))

    def find(self, name: str) -> str | None:
        """The first expression that matches."""
        if len(name) > MAX_NAME:
            return None
        exact = f"^{re.escape(name)}$"
        if exact in self._exact:
            return exact
        return next((text for text, pattern in self._others if pattern.match(name)), None)

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _compiled(text: str, where: str) -> re.Pattern[str]:
    plain = bare(text)
    if _GROUP_REPEATED.search(plain) or len(_REPEAT.findall(plain)) > MAX_REPEATS or re.search(r"\\\d", text):
        raise UnsupportedFormatError(f"{where}: the pattern {text[:100]!r} may take long to match")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UnsupportedFormatError(f"{where}: {text[:100]!r} is not a pattern of names: {error}") from error
