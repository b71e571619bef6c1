"""Several objects of one place as one address space.

A checkpoint may be a folder. To everything behind the reading room it is one source all the same: part
number i begins at `i << PART_BITS`, so that a range is one pair of numbers whichever file it lies in, and no
range can run from one file into the next. Parts are opened when they are first read, at most `OPEN_PARTS`
stay open, and each is pinned to the identity that the listing gave.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ptbin.errors import CorruptArchiveError
from ptbin.stores.reader import RangeReader
from ptbin.stores.values import Identity, ListedObject, check_range

if TYPE_CHECKING:
    from ptbin.stores.place import Place
    from ptbin.stores.reader import WriteAt

__all__ = ["PART_BITS", "JoinedReader", "PartReader", "joint_identity", "part_base"]

PART_BITS = 48
"""Files of up to 256 TiB each; 2^15 of them before an offset leaves 63 bits."""

MAX_PARTS = 1 << 15
OPEN_PARTS = 64


def part_base(index: int) -> int:
    """Where part `index` begins in the address space."""
    return index << PART_BITS


def joint_identity(parts: Iterable[tuple[str, int, Identity | None]]) -> Identity:
    """One identity for (path, size, identity) of every part, whatever their order."""
    digest = hashlib.sha256()
    for path, size, identity in sorted(parts, key=lambda part: part[0]):
        kind, value = (identity.kind, identity.value) if identity is not None else ("", "")
        digest.update(f"{path}\0{size}\0{kind}\0{value}\n".encode("utf-8", "surrogatepass"))
    return Identity("parts", digest.hexdigest())


class JoinedReader(RangeReader):
    """The parts in the order given; `names` are their paths below the folder."""

    def __init__(self, folder: Place, parts: Sequence[ListedObject], *, uri: str | None = None) -> None:
        if len(parts) > MAX_PARTS:
            raise CorruptArchiveError(f"{folder.uri}: {len(parts)} files, the limit is {MAX_PARTS}")
        identity = joint_identity((part.path, part.size, part.identity) for part in parts)
        super().__init__(uri or folder.uri, sum(part.size for part in parts), identity)
        self.parts = tuple(parts)
        self.names = tuple(part.path for part in parts)
        self._numbers = {part.path: index for index, part in enumerate(parts)}
        self._folder = folder
        self._open: OrderedDict[int, RangeReader] = OrderedDict()
        self._used: set[int] = set()
        self._closed_requests = 0
        self._closed_nbytes = 0

    def part(self, name: str) -> PartReader:
        """One file by itself, its offsets counted from its own beginning."""
        return PartReader(self, self._numbers[name])

    def reader_of(self, index: int) -> RangeReader:
        """The open reader of a part."""
        reader = self._open.get(index)
        if reader is not None:
            self._open.move_to_end(index)
            return reader
        while len(self._open) >= OPEN_PARTS:
            _, oldest = self._open.popitem(last=False)
            self._retire(oldest)
        reader = (self._folder / self.names[index]).open_reader(expected=self.parts[index].identity)
        self._open[index] = reader
        self._used.add(index)
        return reader

    def locate(self, offset: int, nbytes: int) -> tuple[RangeReader, int]:
        """Raises CorruptArchiveError where no part holds the range."""
        index, inner = offset >> PART_BITS, offset & (part_base(1) - 1)
        if not 0 <= index < len(self.parts):
            raise CorruptArchiveError(f"{self.uri}: its index points outside of its {len(self.parts)} files")
        check_range(f"{self.uri}/{self.names[index]}", self.parts[index].size, inner, nbytes)
        return self.reader_of(index), inner

    @property
    def requests(self) -> int:
        return self._closed_requests + sum(reader.requests for reader in self._open.values())

    @requests.setter
    def requests(self, value: int) -> None:
        self._closed_requests = value

    @property
    def bytes_read(self) -> int:
        return self._closed_nbytes + sum(reader.bytes_read for reader in self._open.values())

    @bytes_read.setter
    def bytes_read(self, value: int) -> None:
        self._closed_nbytes = value

    def read(self, offset: int, nbytes: int) -> bytes:
        reader, inner = self.locate(offset, nbytes)
        return reader.read(inner, nbytes)

    def iter_ranges(
        self,
        ranges: Sequence[tuple[int, int]],
        *,
        chunk_nbytes: int | None = None,
        gap_nbytes: int | None = None,
    ) -> Iterator[tuple[int, bytes]]:
        """The read-ahead ends with each file."""
        for start, reader, inner in self._by_part(ranges):
            for number, piece in reader.iter_ranges(inner, chunk_nbytes=chunk_nbytes, gap_nbytes=gap_nbytes):
                yield start + number, piece

    def _by_part(
        self, ranges: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, RangeReader, list[tuple[int, int]]]]:
        """Neighbours in one part: the number of the first, the part's reader, the ranges there."""
        start = 0
        for _, neighbours in groupby(ranges, key=lambda place: place[0] >> PART_BITS):
            located = [(*self.locate(offset, nbytes), nbytes) for offset, nbytes in neighbours]
            yield start, located[0][0], [(inner, nbytes) for _, inner, nbytes in located]
            start += len(located)

    @property
    def is_local(self) -> bool:
        return self._folder.is_local

    @property
    def server_side_store(self) -> object | None:
        return self.reader_of(0).server_side_store

    def scatter(
        self, ranges: Sequence[tuple[int, int]], targets: Sequence[int], write_at: WriteAt
    ) -> Iterator[tuple[int, int, int]]:
        for start, reader, inner in self._by_part(ranges):
            part_targets = targets[start : start + len(inner)]
            for number, crc32, nbytes in reader.scatter(inner, part_targets, write_at):
                yield start + number, crc32, nbytes

    def check_unchanged(self) -> None:
        for index in sorted(self._used):
            self.reader_of(index).check_unchanged()

    def confirm(self) -> None:
        for index in sorted(self._used):
            self.reader_of(index).confirm()

    def close(self) -> None:
        for reader in self._open.values():
            self._retire(reader)
        self._open.clear()

    def _retire(self, reader: RangeReader) -> None:
        self._closed_requests += reader.requests
        self._closed_nbytes += reader.bytes_read
        reader.close()


class PartReader:
    """One part as a `reading.source.RandomReader`."""

    def __init__(self, joined: JoinedReader, index: int) -> None:
        self.name = joined.names[index]
        self._joined = joined
        self.index = index
        self.base = part_base(index)
        self.size = joined.parts[index].size
        self.uri = joined.parts[index].uri

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._joined.read(self.base + offset, nbytes)
