"""Byte streams that are computed on the way: inflated, gathered, put in order, assembled, swapped, cast.

Bounded memory: a few MiB whatever the tensor's size. Each stream reads its source forward only.
"""

from __future__ import annotations

import array
import itertools
import math
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ptbin.errors import ChecksumMismatchError
from ptbin.splice.assembly import iter_assembled
from ptbin.splice.strided import iter_in_order
from ptbin.stores.inflate import iter_inflated
from ptbin.values.segments import Assemble, Cast, Gather, Recipe, Slice, Strided, Swap
from ptbin.values.tensors import ByteRange, Deflated, InMemory

if TYPE_CHECKING:
    from ptbin.splice.casting import CastTally
    from ptbin.stores import RangeReader

__all__ = ["iter_recipe"]

CHUNK_NBYTES = 4 << 20
# A hole this large inside a gather is skipped by a new read instead of read through.
HOLE_NBYTES = 256 * 1024

_SWAP_CODES = {2: "H", 4: "I", 8: "Q"}


def iter_recipe(
    recipe: Recipe, reader: RangeReader, overflows: dict[str, CastTally], *, check: bool = True
) -> Iterator[bytes]:
    """The bytes of a recipe, in pieces.

    Args:
        overflows: casts count here what became infinite, by the recipe's `what`.
        check: hold ranges that are read whole against the CRC-32 their container states.

    Raises:
        ChecksumMismatchError, CorruptArchiveError: the source is damaged.
    """
    if isinstance(recipe, Cast):
        from ptbin.splice.casting import CastTally, iter_cast

        inner = (iter_recipe(part, reader, overflows, check=check) for part in recipe.inner)
        tally = overflows.setdefault(recipe.what, CastTally())
        return iter_cast(itertools.chain.from_iterable(inner), recipe.source, recipe.target, tally)
    if isinstance(recipe, Swap):
        return _swapped(iter_recipe(recipe.inner, reader, overflows, check=check), recipe.width)
    if isinstance(recipe, Assemble):
        return iter_assembled(recipe.tiled, reader)
    if isinstance(recipe, Gather):
        return _gathered(recipe, reader)
    if isinstance(recipe, Strided):
        return _in_order(recipe, reader)
    place = recipe.place
    if isinstance(place, InMemory):
        return iter((place.data[recipe.offset : recipe.offset + recipe.nbytes],))
    if isinstance(place, Deflated):
        return _window(iter_inflated(place, reader), recipe)
    stream = reader.iter_range(place.offset + recipe.offset, recipe.nbytes, chunk_nbytes=CHUNK_NBYTES)
    if check and place.crc32 is not None and recipe.nbytes == place.nbytes:
        return _checked(stream, place, reader.uri)
    return stream


def _checked(stream: Iterator[bytes], place: ByteRange, uri: str) -> Iterator[bytes]:
    crc = 0
    for piece in stream:
        crc = zlib.crc32(piece, crc)
        yield piece
    if crc != place.crc32:
        raise ChecksumMismatchError(
            f"{uri}: {place.member} has CRC-32 {crc:08x}, the archive states {place.crc32:08x}"
        )


def _in_order(recipe: Strided, reader: RangeReader) -> Iterator[bytes]:
    place = recipe.place
    if isinstance(place, ByteRange):
        base = place.offset

        def read(offset: int, nbytes: int) -> bytes:
            return reader.read(base + offset, nbytes)
    else:
        # A deflated storage has no random access: it is inflated once, within `Limits.expanded_nbytes`.
        data = place.data if isinstance(place, InMemory) else b"".join(iter_inflated(place, reader))

        def read(offset: int, nbytes: int) -> bytes:
            return data[offset : offset + nbytes]

    return iter_in_order(read, recipe.offset, recipe.shape, recipe.stride, recipe.itemsize)


def _window(stream: Iterator[bytes], recipe: Slice) -> Iterator[bytes]:
    """The part of a stream that a slice wants; the rest is read all the same, for its CRC-32."""
    position = 0
    end = recipe.offset + recipe.nbytes
    for piece in stream:
        first = max(recipe.offset - position, 0)
        last = min(end - position, len(piece))
        if first < last:
            yield piece[first:last]
        position += len(piece)


def _swapped(stream: Iterator[bytes], width: int) -> Iterator[bytes]:
    rest = b""
    for piece in stream:
        data = rest + piece if rest else piece
        whole = len(data) // width * width
        values = array.array(_SWAP_CODES[width], data[:whole])
        values.byteswap()
        rest = data[whole:]
        if whole:
            yield values.tobytes()


def _gathered(gather: Gather, reader: RangeReader) -> Iterator[bytes]:
    dims = list(zip(gather.shape, gather.stride, strict=True))
    run = 1
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    place = gather.place
    if isinstance(place, InMemory):
        source = _MemorySource(place.data)
        yield from _walk(source, gather.offset, dims, run, gather.itemsize)
    else:
        yield from _walk(reader, place.offset + gather.offset, dims, run, gather.itemsize)


class _MemorySource:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._data[offset : offset + nbytes]

    def iter_range(self, offset: int, nbytes: int, *, chunk_nbytes: int | None = None) -> Iterator[bytes]:
        del chunk_nbytes
        yield self._data[offset : offset + nbytes]


def _walk(
    source: RangeReader | _MemorySource, offset: int, dims: list[tuple[int, int]], run: int, itemsize: int
) -> Iterator[bytes]:
    """Runs of `run` elements at every combination of `dims`, in blocks of bounded span."""
    span = (sum((n - 1) * s for n, s in dims) + run) * itemsize
    if not dims:
        yield from source.iter_range(offset, run * itemsize, chunk_nbytes=CHUNK_NBYTES)
        return
    (count, stride), inner = dims[0], dims[1:]
    step = stride * itemsize
    inner_span = span - (count - 1) * step
    if step - inner_span > HOLE_NBYTES or inner_span > CHUNK_NBYTES:
        for index in range(count):
            yield from _walk(source, offset + index * step, inner, run, itemsize)
        return
    import numpy

    group = max(1, (CHUNK_NBYTES - inner_span) // step + 1)
    shape = [n for n, _ in inner]
    strides = [s * itemsize for _, s in inner]
    for start in range(0, count, group):
        taken = min(group, count - start)
        block = source.read(offset + start * step, (taken - 1) * step + inner_span)
        flat = numpy.frombuffer(block, dtype=numpy.uint8)
        view = numpy.lib.stride_tricks.as_strided(
            flat, (taken, *shape, run * itemsize), (step, *strides, 1), writeable=False
        )
        assert math.prod(view.shape) <= len(block)
        yield view.tobytes()
