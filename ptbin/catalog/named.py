"""A list of files below SOURCE that alone are looked at (`--files-from`, `--retry-failed`). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ptbin.catalog.jobs import Problem
from ptbin.errors import StorageError
from ptbin.values.names import shown_path


def parse_lines(data: bytes) -> list[str]:
    """Paths, one a line, as they stand there; empty lines and a byte order mark are passed over.

    Bytes that are not UTF-8 stay.
    """
    lines = data.decode("utf-8-sig", errors="surrogateescape").split("\n")
    return [path for line in lines if (path := line.removesuffix("\r"))]


@dataclass(slots=True)
class NamedFiles:
    """Paths below SOURCE, and which of them have not been found yet.

    A part of a checkpoint of several files stands for all of it. Raises nothing: what is not below SOURCE
    is `missing` in the end.
    """

    paths: Iterable[str]
    """As they were given; afterwards, as a listing writes them."""
    _wanted: frozenset[str] = field(init=False)
    _left: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._wanted = frozenset(path.removeprefix("./").rstrip("/") for path in self.paths)
        self.paths = self._wanted
        self._left = set(self._wanted)

    def takes(self, *paths: str) -> bool:
        """Whether a checkpoint that is called by these names, one or several, is on the list."""
        found = self._wanted.intersection(paths)
        self._left -= found
        return bool(found)

    def holds(self, path: str) -> bool:
        """Whether `path` is on the list, or a folder of something that is."""
        return path in self._wanted or any(name.startswith(f"{path}/") for name in self._wanted)

    def missing(self, source: str) -> list[Problem]:
        """A problem for each path that no listing of `source` came upon."""
        detail = "it is named, and there is no such file below SOURCE that could be a checkpoint"
        base = source.rstrip("/")
        return [
            Problem(shown_path(f"{base}/{path}"), StorageError.reason, detail + _hint(path))
            for path in sorted(self._left)
        ]


def _hint(path: str) -> str:
    if path.startswith("/") or "://" in path:
        return "; name it as it is called below SOURCE"
    if "\0" in path:
        return "; one name a line, without NUL between them"
    return ""
