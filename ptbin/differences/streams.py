"""The bytes of many tensors one behind the other, in pieces of the size that the caller asks for.

Tensors that lie in their file as they are come by ranged reads, neighbours together and, from stores that
read ahead, several requests at a time. Others come by `proof.logical`. Memory: what the store reads ahead,
and one block.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence

from ptbin.errors import CorruptArchiveError
from ptbin.proof.logical import iter_logical_bytes
from ptbin.stores import RangeReader
from ptbin.stores.inflate import iter_inflated
from ptbin.values.tensors import ByteRange, Deflated, TensorRef


def is_plain(view: TensorRef) -> bool:
    """Whether the tensor's bytes lie in one range of the source, in order."""
    return isinstance(view.storage.place, ByteRange) and view.contiguous and not view.storage.big_endian


def part_of(view: TensorRef, start: int, count: int) -> TensorRef:
    """`count` elements of a contiguous tensor, from flat index `start` on."""
    return TensorRef(view.storage, view.dtype, (count,), (1,), view.storage_offset + start, flags=view.flags)


def iter_views(views: Sequence[TensorRef], reader: RangeReader) -> Generator[bytes, None, None]:
    """The logical bytes of every view, in order; exactly `TensorRef.nbytes` of each.

    Raises:
        CorruptArchiveError: a tensor gives another number of bytes.
    """
    for plain, group in itertools.groupby(views, is_plain):
        if plain:
            for _, piece in reader.iter_ranges([_range_of(view) for view in group if view.numel]):
                yield piece
            continue
        for view in group:
            got = 0
            for piece in _iter_one(view, reader):
                got += len(piece)
                yield piece
            if got != view.nbytes:
                raise CorruptArchiveError(
                    f"{reader.uri}: storage {view.storage.key!r} gives {got} bytes, expected {view.nbytes}"
                )


def _range_of(view: TensorRef) -> tuple[int, int]:
    place = view.storage.place
    assert isinstance(place, ByteRange)
    return place.offset + view.span[0], view.nbytes


def _iter_one(view: TensorRef, reader: RangeReader) -> Iterator[bytes]:
    place = view.storage.place
    if not (isinstance(place, Deflated) and view.contiguous and not view.storage.big_endian):
        yield from iter_logical_bytes(view, reader)
        return
    # A stream that is inflated on the way; to its end, where its CRC-32 is checked.
    yield from iter_inflated(place, reader, view.span[0], view.nbytes)


class Feed:
    """A stream of pieces, cut anew."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def take(self, nbytes: int) -> memoryview:
        """The next `nbytes`; without a copy where one piece holds them.

        Raises:
            CorruptArchiveError: the stream ends before.
        """
        if len(self._rest) >= nbytes:
            taken, self._rest = self._rest[:nbytes], self._rest[nbytes:]
            return taken
        gathered = bytearray(self._rest)
        while len(gathered) < nbytes:
            piece = next(self._pieces, None)
            if piece is None:
                raise CorruptArchiveError(f"a tensor ends {nbytes - len(gathered)} bytes early")
            self._rest = memoryview(piece)
            missing = nbytes - len(gathered)
            gathered += self._rest[:missing]
            self._rest = self._rest[missing:]
        return memoryview(gathered)
