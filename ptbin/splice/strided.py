"""The elements of a strided view in logical order: what formats without strides store of a transposed matrix.

Bounded memory: blocks of a few MiB of output. A view whose elements lie all over a long storage is read once
for every block. The proof has its own implementation of the same (`proof.logical`), on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["iter_in_order"]

BLOCK_NBYTES = 8 << 20
SPAN_NBYTES = 32 << 20

Read = Callable[[int, int], bytes]


def iter_in_order(
    read: Read, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int
) -> Iterator[bytes]:
    """Blocks of the view's elements, row-major.

    Args:
        read: (offset, nbytes) to exactly these bytes.
        offset: first byte of the view. shape, stride: elements.
    """
    axes = [(n, s) for n, s in zip(shape, stride, strict=True) if n != 1]
    if math.prod(n for n, _ in axes) == 0:
        return
    yield from _blocks(read, offset, axes, itemsize)


def _blocks(read: Read, offset: int, axes: list[tuple[int, int]], itemsize: int) -> Iterator[bytes]:
    inner_nbytes = math.prod(n for n, _ in axes[1:]) * itemsize
    if axes and inner_nbytes > BLOCK_NBYTES:
        count, step = axes[0]
        for index in range(count):
            yield from _blocks(read, offset + index * step * itemsize, axes[1:], itemsize)
        return
    if not axes:
        yield read(offset, itemsize)
        return
    (count, step), inner = axes[0], axes[1:]
    rows = max(1, BLOCK_NBYTES // inner_nbytes)
    for start in range(0, count, rows):
        part = [(min(rows, count - start), step), *inner]
        yield _packed(read, offset + start * step * itemsize, part, itemsize).tobytes()


def _packed(read: Read, offset: int, axes: list[tuple[int, int]], itemsize: int) -> NDArray[Any]:
    """The view as a dense array of bytes; long spans are read piecewise along the largest stride."""
    import numpy

    span = (sum((n - 1) * s for n, s in axes) + 1) * itemsize
    counts = [n for n, _ in axes]
    if span <= SPAN_NBYTES:
        flat = numpy.frombuffer(read(offset, span), dtype=numpy.uint8)
        view = numpy.lib.stride_tricks.as_strided(
            flat, (*counts, itemsize), (*(s * itemsize for _, s in axes), 1), writeable=False
        )
        return numpy.ascontiguousarray(view)
    packed = numpy.empty((*counts, itemsize), dtype=numpy.uint8)
    longest = max(range(len(axes)), key=lambda axis: (axes[axis][0] - 1) * axes[axis][1])
    count, step = axes[longest]
    half = count // 2
    for first, taken in ((0, half), (half, count - half)):
        part = list(axes)
        part[longest] = (taken, step)
        where = (*(slice(None),) * longest, slice(first, first + taken))
        packed[where] = _packed(read, offset + first * step * itemsize, part, itemsize)
    return packed
