"""Random access to one source file for its index: few reads, each remembered.

Sits between the parsers and a store's pinned reader. The parsers ask for small pieces in any order;
`SourceFile` answers from blocks it already has, so that indexing a remote archive costs the tail, the
directory where the tail did not hold it, and the pickle. Weights never pass through here.
"""

from __future__ import annotations

from typing import Protocol

from ptbin.errors import CorruptArchiveError

__all__ = ["RandomReader", "SourceFile"]

# One request of this size holds the end record and the directory of a few hundred members, the magic
# bytes at the start, or the whole of a small file.
EDGE_NBYTES = 64 * 1024


class RandomReader(Protocol):
    """The part of `stores.RangeReader` that indexing needs."""

    size: int
    uri: str

    def read(self, offset: int, nbytes: int) -> bytes: ...


class SourceFile:
    """Pieces of one file, cached by block."""

    def __init__(self, reader: RandomReader) -> None:
        self._reader = reader
        self.uri = reader.uri
        self.size = reader.size
        self._blocks: list[tuple[int, bytes]] = []

    def fetch(self, offset: int, nbytes: int) -> None:
        """Read a range now, in one request, so that reads inside it cost nothing."""
        end = min(offset + nbytes, self.size)
        offset = max(offset, 0)
        if end > offset and self._cached(offset, end - offset) is None:
            self._blocks.append((offset, self._reader.read(offset, end - offset)))

    def read(self, offset: int, nbytes: int, what: str = "bytes") -> bytes:
        """Exactly `nbytes` at `offset`.

        Raises:
            CorruptArchiveError: the file ends before.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CorruptArchiveError(
                f"{self.uri}: {what} should be {nbytes} bytes at "
                f"{offset}, the file has {self.size}; is it truncated?"
            )
        cached = self._cached(offset, nbytes)
        if cached is None:
            return self._reader.read(offset, nbytes)
        return cached

    def head(self, nbytes: int) -> bytes:
        """The first bytes, fewer where the file is shorter."""
        self.fetch(0, EDGE_NBYTES)
        return self.read(0, min(nbytes, self.size))

    def tail(self, nbytes: int) -> tuple[int, bytes]:
        """Offset and content of the last bytes."""
        offset = max(0, self.size - nbytes)
        self.fetch(offset, nbytes)
        return offset, self.read(offset, self.size - offset)

    def _cached(self, offset: int, nbytes: int) -> bytes | None:
        for start, block in self._blocks:
            if start <= offset and offset + nbytes <= start + len(block):
                return block[offset - start : offset - start + nbytes]
        return None
