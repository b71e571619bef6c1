"""A tensor's logical, contiguous bytes, whatever its strides, as a bounded stream.

This is the content that a tensor's SHA-256 in a manifest covers: the same for every output format.
"""

from __future__ import annotations

import array
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ptbin.stores import RangeReader
from ptbin.stores.inflate import iter_inflated
from ptbin.values.tensors import ByteRange, Deflated, InMemory, Joined, Place, TensorRef, Tiled, dense_strides

if TYPE_CHECKING:
    import numpy
    import numpy.typing


BLOCK_NBYTES = 8 << 20
CHUNK_NBYTES = 4 << 20

_SWAP_CODES = {2: "H", 4: "I", 8: "Q"}

ReadSpan = Callable[[int, int], Iterator[bytes]]


def iter_logical_bytes(tensor: TensorRef, reader: RangeReader) -> Iterator[bytes]:
    """The bytes of a tensor of the source as torch would give them, little-endian."""
    place = tensor.storage.place
    assert place is not None

    def read(offset: int, nbytes: int) -> Iterator[bytes]:
        return _iter_place(place, offset, nbytes, reader)

    first = tensor.storage_offset // tensor.dtype.per_unit * tensor.dtype.itemsize
    width = tensor.dtype.swap_nbytes
    swap = tensor.storage.big_endian and width > 1
    stream = iter_strided(
        read, first, tensor.shape, tensor.stride, tensor.dtype.itemsize, tensor.dtype.per_unit
    )
    for piece in stream:
        if swap:
            values = array.array(_SWAP_CODES[width], piece)
            values.byteswap()
            yield values.tobytes()
        else:
            yield piece


def _iter_place(place: Place, offset: int, nbytes: int, reader: RangeReader) -> Iterator[bytes]:
    """Bytes of a storage, wherever they are."""
    if isinstance(place, ByteRange):
        yield from reader.iter_range(place.offset + offset, nbytes, chunk_nbytes=CHUNK_NBYTES)
    elif isinstance(place, InMemory):
        yield place.data[offset : offset + nbytes]
    elif isinstance(place, Deflated):
        yield _inflate(place, reader)[offset : offset + nbytes]
    elif isinstance(place, Joined):
        for part in place.parts:
            first, last = max(offset, 0), min(offset + nbytes, part.nbytes)
            if first < last:
                yield from _iter_place(part, first, last - first, reader)
            offset -= part.nbytes
    else:
        yield from _iter_tiled(place, offset, nbytes, reader)


def _iter_tiled(place: Tiled, offset: int, nbytes: int, reader: RangeReader) -> Iterator[bytes]:
    """Line by line: the runs of the last dimension, each from the tiles that cross it."""
    width = place.shape[-1] if place.shape else 1
    line_nbytes = width * place.itemsize
    outer = place.shape[:-1]
    for line in range(offset // line_nbytes, -(-(offset + nbytes) // line_nbytes)):
        where = []
        rest = line
        for n in reversed(outer):
            where.append(rest % n)
            rest //= n
        where.reverse()
        pieces = []
        for tile in place.tiles:
            inside = [i - s for i, s in zip(where, tile.start, strict=False)]
            if all(0 <= i < n for i, n in zip(inside, tile.shape, strict=False)) and 0 not in tile.shape:
                run = tile.shape[-1] if tile.shape else 1
                step = tile.stride[-1] if tile.stride else 1
                first = sum(i * s for i, s in zip(inside, tile.stride, strict=False)) * place.itemsize
                span = ((run - 1) * step + 1) * place.itemsize
                data = b"".join(_iter_place(tile.place, tile.offset + first, span, reader))
                if step != 1:
                    starts = range(0, span, step * place.itemsize)
                    data = b"".join(data[at : at + place.itemsize] for at in starts)
                pieces.append((tile.start[-1] if tile.start else 0, data))
        whole = b"".join(data for _, data in sorted(pieces))
        begin = line * line_nbytes
        yield whole[max(offset - begin, 0) : min(offset + nbytes - begin, line_nbytes)]


def _inflate(place: Deflated, reader: RangeReader) -> bytes:
    return b"".join(iter_inflated(place, reader))


def iter_strided(
    read: ReadSpan,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    itemsize: int,
    per_unit: int = 1,
) -> Iterator[bytes]:
    """The elements of a strided view in logical order.

    Contiguous views stream. Others are taken block by block of the outermost dimensions; where even
    one block's elements lie all over a large storage (a transposed matrix), the storage is read once
    for every 8 MiB of output.

    Args:
        read: (offset, nbytes) to the bytes there, in pieces.
        offset: first byte; shape and stride in elements; `per_unit` elements share one stored unit.
    """
    count = math.prod(shape)
    if count == 0:
        return
    if _contiguous(shape, stride):
        yield from read(offset, -(-count // per_unit) * itemsize)
        return
    import numpy

    # numpy takes 64 dimensions at most, and those of one element say nothing.
    axes = [(n, s) for n, s in zip(shape, stride, strict=True) if n != 1]
    shape, stride = tuple(n for n, _ in axes), tuple(s for _, s in axes)
    span = (sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1) * itemsize
    if span <= BLOCK_NBYTES:
        flat = numpy.frombuffer(b"".join(read(offset, span)), dtype=numpy.uint8)
        yield from _blocks(flat, shape, stride, itemsize)
        return
    inner_nbytes = math.prod(shape[1:]) * itemsize
    inner_span = (sum((n - 1) * s for n, s in zip(shape[1:], stride[1:], strict=True)) + 1) * itemsize
    if inner_span <= BLOCK_NBYTES or inner_nbytes > BLOCK_NBYTES:
        for index in range(shape[0]):
            yield from iter_strided(
                read, offset + index * stride[0] * itemsize, shape[1:], stride[1:], itemsize
            )
        return
    rows = max(1, BLOCK_NBYTES // inner_nbytes)
    for start in range(0, shape[0], rows):
        taken = min(rows, shape[0] - start)
        yield _scan(read, offset + start * stride[0] * itemsize, (taken, *shape[1:]), stride, itemsize)


def _blocks(
    flat: numpy.typing.NDArray[numpy.uint8], shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int
) -> Iterator[bytes]:
    """A view over bytes in memory, packed, a few MiB at a time (expanded ones exceed their span)."""
    import numpy

    view = numpy.lib.stride_tricks.as_strided(
        flat, (*shape, itemsize), (*(s * itemsize for s in stride), 1), writeable=False
    )
    yield from _pack(view)


def _pack(view: numpy.typing.NDArray[numpy.uint8]) -> Iterator[bytes]:
    row_nbytes = view[0].nbytes
    if row_nbytes > CHUNK_NBYTES:
        for part in view:
            yield from _pack(part)
        return
    rows = max(1, CHUNK_NBYTES // max(1, row_nbytes))
    for start in range(0, len(view), rows):
        yield view[start : start + rows].tobytes()


def _scan(
    read: ReadSpan, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int
) -> bytes:
    """One output block whose elements lie all over a long span: one pass, largest stride outermost."""
    import numpy

    order = sorted(range(len(shape)), key=lambda axis: -stride[axis])
    out = numpy.empty((*shape, itemsize), dtype=numpy.uint8)
    sorted_out = out.transpose((*order, len(shape)))
    outer_step = stride[order[0]] * itemsize
    rest_shape = tuple(shape[axis] for axis in order[1:])
    rest_stride = tuple(stride[axis] * itemsize for axis in order[1:])
    rest_span = sum((n - 1) * s for n, s in zip(rest_shape, rest_stride, strict=True)) + itemsize
    group = max(1, CHUNK_NBYTES // max(outer_step, 1))
    for start in range(0, shape[order[0]], group):
        taken = min(group, shape[order[0]] - start)
        flat = numpy.frombuffer(
            b"".join(read(offset + start * outer_step, (taken - 1) * outer_step + rest_span)),
            dtype=numpy.uint8,
        )
        sorted_out[start : start + taken] = numpy.lib.stride_tricks.as_strided(
            flat, (taken, *rest_shape, itemsize), (outer_step, *rest_stride, 1), writeable=False
        )
    return out.tobytes()


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return all(n == 1 or s == d for n, s, d in zip(shape, stride, dense_strides(shape), strict=True))
