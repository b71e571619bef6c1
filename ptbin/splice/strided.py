"""The elements of a strided view, densely: of a view with gaps, of a transposed matrix.

Bounded memory: blocks of 8 MiB of output, of spans up to 32 MiB. A view whose elements lie all over a long
storage is read once for every block. The proof has its own implementation of the same (`proof.logical`), on
purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_NBYTES = 8 << 20
SPAN_NBYTES = 32 << 20
HOLE_NBYTES = 256 * 1024
"""Larger holes between rows are skipped by a new read instead of read through."""

Read = Callable[[int, int], bytes]


def iter_in_order(
    read: Read, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int
) -> Iterator[bytes]:
    """Blocks of the view's elements, row-major.

    Args:
        read: (offset, nbytes) to exactly these bytes.
        offset: first byte of the view. shape, stride: elements.
    """
    if 0 in shape:
        return
    axes: list[tuple[int, int]] = []
    for n, s in zip(shape, stride, strict=True):
        if axes and axes[-1][1] == n * s:
            axes[-1] = (axes[-1][0] * n, s)  # two axes that are one run
        elif n != 1:
            axes.append((n, s))
    steps = [(n, s * itemsize) for n, s in axes]
    unit = itemsize
    if steps and steps[-1][1] == itemsize and steps[-1][0] * itemsize <= BLOCK_NBYTES:
        unit *= steps.pop()[0]
    yield from _blocks(read, offset, steps, unit)


def _blocks(read: Read, offset: int, axes: list[tuple[int, int]], unit: int) -> Iterator[bytes]:
    """Of `axes`, each a count and a step in bytes, the outermost first; `unit`: bytes of each element."""
    if not axes:
        yield read(offset, unit)
        return
    (count, step), inner = axes[0], axes[1:]
    inner_nbytes = math.prod(n for n, _ in inner) * unit
    if inner_nbytes > BLOCK_NBYTES or step - _span(inner, unit) > HOLE_NBYTES:
        for index in range(count):
            yield from _blocks(read, offset + index * step, inner, unit)
        return
    rows = max(1, BLOCK_NBYTES // inner_nbytes)
    for start in range(0, count, rows):
        part = [(min(rows, count - start), step), *inner]
        yield _packed(read, offset + start * step, part, unit).tobytes()


def _span(axes: list[tuple[int, int]], unit: int) -> int:
    return sum((n - 1) * step for n, step in axes) + unit


def _packed(read: Read, offset: int, axes: list[tuple[int, int]], unit: int) -> NDArray[Any]:
    """The view as a dense array of bytes; long spans are read piecewise along the largest stride."""
    import numpy

    span = _span(axes, unit)
    counts = [n for n, _ in axes]
    if span <= SPAN_NBYTES:
        flat = numpy.frombuffer(read(offset, span), dtype=numpy.uint8)
        view = numpy.lib.stride_tricks.as_strided(
            flat, (*counts, unit), (*(step for _, step in axes), 1), writeable=False
        )
        return numpy.ascontiguousarray(view)
    packed = numpy.empty((*counts, unit), dtype=numpy.uint8)
    longest = max(range(len(axes)), key=lambda axis: (axes[axis][0] - 1) * axes[axis][1])
    count, step = axes[longest]
    half = count // 2
    for first, taken in ((0, half), (half, count - half)):
        part = list(axes)
        part[longest] = (taken, step)
        where = (*(slice(None),) * longest, slice(first, first + taken))
        packed[where] = _packed(read, offset + first * step, part, unit)
    return packed
