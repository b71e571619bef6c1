"""A tensor from its tiles, a slab of rows at a time.

Bounded memory: a slab of a few MiB, and what of the tiles falls into it. Tiles are read forward only. Where a
tile is stored densely from end to end, its CRC-32 is checked as its rows pass.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ptbin.values.crc32 import confirm_crc32
from ptbin.values.tensors import ByteRange, InMemory, Tile, Tiled, dense_strides

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ptbin.stores import RangeReader

__all__ = ["iter_assembled"]

SLAB_NBYTES = 8 << 20


def iter_assembled(tiled: Tiled, reader: RangeReader) -> Iterator[bytes]:
    """The tensor's bytes, row-major.

    Raises:
        ChecksumMismatchError: a tile whose CRC-32 is not the one its container states.
    """
    tiles = [_OpenTile(tile, tiled.itemsize) for tile in tiled.tiles if math.prod(tile.shape)]
    yield from _slabs(tiled.shape, (), tiles, tiled, reader)
    for tile in tiles:
        tile.check(reader.uri)


def _slabs(
    shape: tuple[int, ...], prefix: tuple[int, ...], tiles: list[_OpenTile], tiled: Tiled, reader: RangeReader
) -> Iterator[bytes]:
    """The part of the tensor below fixed leading indices, cut along its first free dimension."""
    free = shape[len(prefix) :]
    row_nbytes = math.prod(free[1:]) * tiled.itemsize
    if len(free) > 1 and row_nbytes > SLAB_NBYTES:
        for index in range(free[0]):
            yield from _slabs(shape, (*prefix, index), tiles, tiled, reader)
        return
    rows = max(1, SLAB_NBYTES // max(row_nbytes, 1)) if free else 1
    for start in range(0, free[0] if free else 1, rows):
        low = (*prefix, start, *(0,) * (len(free) - 1)) if free else prefix
        taken = min(rows, free[0] - start) if free else 1
        extent = (*(1,) * len(prefix), taken, *free[1:]) if free else (1,) * len(prefix)
        yield _slab(low, extent, tiles, tiled.itemsize, reader)


def _slab(
    low: tuple[int, ...],
    extent: tuple[int, ...],
    tiles: list[_OpenTile],
    itemsize: int,
    reader: RangeReader,
) -> bytes:
    import numpy

    slab = numpy.empty((*extent, itemsize), dtype=numpy.uint8)
    for tile in tiles:
        box = tile.overlap(low, extent)
        if box is not None:
            inside = tuple(slice(b - o, b - o + n) for (b, n), o in zip(box, low, strict=True))
            slab[inside] = tile.read(box, reader)
    return slab.tobytes()


class _OpenTile:
    """A tile being read, and the CRC-32 of what has passed."""

    def __init__(self, tile: Tile, itemsize: int) -> None:
        self.tile = tile
        self._itemsize = itemsize
        self._crc = 0
        self._passed = 0
        self._dense = tile.stride == dense_strides(tile.shape)

    def overlap(self, low: tuple[int, ...], extent: tuple[int, ...]) -> list[tuple[int, int]] | None:
        """(first index, count) along each dimension of what falls into a box of the whole tensor."""
        box = []
        for first, count, start, size in zip(low, extent, self.tile.start, self.tile.shape, strict=True):
            begin, end = max(first, start), min(first + count, start + size)
            if begin >= end:
                return None
            box.append((begin, end - begin))
        return box

    def read(self, box: list[tuple[int, int]], reader: RangeReader) -> NDArray[Any]:
        """The bytes of a box, given in indices of the whole tensor; the last axis is an element's bytes."""
        import numpy

        tile, itemsize = self.tile, self._itemsize
        counts = [n for _, n in box]
        first = sum(
            (begin - start) * step
            for (begin, _), start, step in zip(box, tile.start, tile.stride, strict=True)
        )
        span = sum((n - 1) * step for n, step in zip(counts, tile.stride, strict=True)) + 1
        offset = tile.offset + first * itemsize
        data = _read(tile.place, offset, span * itemsize, reader)
        if self._dense and offset - tile.offset == self._passed:
            self._crc = zlib.crc32(data, self._crc)
            self._passed += len(data)
        flat = numpy.frombuffer(data, dtype=numpy.uint8)
        steps = (*(step * itemsize for step in tile.stride), 1)
        return numpy.lib.stride_tricks.as_strided(flat, (*counts, itemsize), steps, writeable=False)

    def check(self, uri: str) -> None:
        place = self.tile.place
        if isinstance(place, ByteRange) and self._passed == place.nbytes:
            confirm_crc32(uri, place.member, self._crc, place.crc32)


def _read(place: ByteRange | InMemory, offset: int, nbytes: int, reader: RangeReader) -> bytes:
    if isinstance(place, InMemory):
        return place.data[offset : offset + nbytes]
    return reader.read(place.offset + offset, nbytes)
