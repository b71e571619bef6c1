"""A tensor from its tiles, a slab of rows at a time.

Bounded memory: a slab of a few MiB, and what of the tiles falls into it. Tiles are read forward only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ptbin.stores import RangeReader
from ptbin.values.tensors import InMemory, Tile, Tiled

if TYPE_CHECKING:
    from numpy.typing import NDArray


SLAB_NBYTES = 8 << 20


def iter_assembled(tiled: Tiled, reader: RangeReader) -> Iterator[bytes]:
    """The tensor's bytes, row-major."""
    tiles = [tile for tile in tiled.tiles if math.prod(tile.shape)]
    yield from _slabs(tiled.shape, (), tiles, tiled, reader)


def _slabs(
    shape: tuple[int, ...], prefix: tuple[int, ...], tiles: list[Tile], tiled: Tiled, reader: RangeReader
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
    low: tuple[int, ...], extent: tuple[int, ...], tiles: list[Tile], itemsize: int, reader: RangeReader
) -> bytes:
    import numpy

    slab = numpy.empty((*extent, itemsize), dtype=numpy.uint8)
    for tile in tiles:
        box = _overlap(tile, low, extent)
        if box is not None:
            inside = tuple(slice(b - o, b - o + n) for (b, n), o in zip(box, low, strict=True))
            slab[inside] = _read(tile, box, itemsize, reader)
    return slab.tobytes()


def _overlap(tile: Tile, low: tuple[int, ...], extent: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """(first index, count) along each dimension of what of a tile falls into a box of the whole tensor."""
    box = []
    for first, count, start, size in zip(low, extent, tile.start, tile.shape, strict=True):
        begin, end = max(first, start), min(first + count, start + size)
        if begin >= end:
            return None
        box.append((begin, end - begin))
    return box


def _read(tile: Tile, box: list[tuple[int, int]], itemsize: int, reader: RangeReader) -> NDArray[Any]:
    """The bytes of a box, given in indices of the whole tensor; the last axis is an element's bytes."""
    import numpy

    counts = [n for _, n in box]
    first = sum(
        (begin - start) * step for (begin, _), start, step in zip(box, tile.start, tile.stride, strict=True)
    )
    span = sum((n - 1) * step for n, step in zip(counts, tile.stride, strict=True)) + 1
    offset, nbytes = tile.offset + first * itemsize, span * itemsize
    place = tile.place
    if isinstance(place, InMemory):
        data = place.data[offset : offset + nbytes]
    else:
        data = reader.read(place.offset + offset, nbytes)
    flat = numpy.frombuffer(data, dtype=numpy.uint8)
    steps = (*(step * itemsize for step in tile.stride), 1)
    return numpy.lib.stride_tricks.as_strided(flat, (*counts, itemsize), steps, writeable=False)
