"""Random access to one source file for its index: few reads, each remembered.

Sits between the parsers and a store's pinned reader. The parsers ask for small pieces in any order;
`SourceFile` answers from blocks it already has, so that indexing a remote archive costs the tail, the
directory where the tail did not hold it, and the pickle. Weights never pass through here.
"""

from __future__ import annotations

from typing import Protocol

from ptbin.errors import CorruptArchiveError

# One request of this size holds the end record and the directory of a few hundred members, the magic
# bytes at the start, or the whole of a small file.
EDGE_NBYTES = 64 * 1024


class Readable(Protocol):
    def read(self, offset: int, nbytes: int, /) -> bytes: ...


class RandomReader(Readable, Protocol):
    """The part of `stores.RangeReader` that indexing needs."""

    size: int
    uri: str


class Window:
    """A span of a file as a `RandomReader`: a member of an archive, a chunk."""

    def __init__(self, file: Readable, offset: int, nbytes: int, uri: str) -> None:
        self._file = file
        self._offset = offset
        self.size = nbytes
        self.uri = uri

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._file.read(self._offset + offset, nbytes)


class MemoryReader:
    """Bytes in memory, as a `RandomReader`."""

    def __init__(self, data: bytes | bytearray, uri: str) -> None:
        self._data = data
        self.size = len(data)
        self.uri = uri

    def read(self, offset: int, nbytes: int) -> bytes:
        return bytes(memoryview(self._data)[offset : offset + nbytes])


class SourceFile:
    """Pieces of one file, cached by block."""

    def __init__(self, reader: RandomReader) -> None:
        self._reader = reader
        self.uri = reader.uri
        self.size = reader.size
        self._blocks: list[tuple[int, bytes]] = []
        self._ahead: tuple[int, bytes] = (0, b"")
        self.reads_ahead = 0
        """Requests that `read_ahead` has made."""

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

    def read_ahead(self, offset: int, nbytes: int, ahead: int, what: str) -> bytes:
        """As `read`, for a walk through the file: one request brings `ahead` bytes, and only it is kept."""
        start, block = self._ahead
        if not start <= offset <= offset + nbytes <= start + len(block):
            if self._cached(offset, nbytes) is not None or nbytes > ahead:
                return self.read(offset, nbytes, what)
            ahead = max(0, min(ahead, self.size - offset))
            block = self.read(offset, max(ahead, nbytes), what)
            self._ahead = start, _ = offset, block
            self.reads_ahead += 1
        return block[offset - start : offset - start + nbytes]

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
