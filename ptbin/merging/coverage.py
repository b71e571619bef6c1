"""The proof that boxes fill a tensor: every element is in exactly one of them. Pure.

A box is (start, extent), in elements, one number for each dimension.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

from ptbin.errors import CorruptArchiveError, LimitExceededError

Box = tuple[tuple[int, ...], tuple[int, ...]]

MAX_SPLIT_DIMENSIONS = 6
"""Dimensions that a tensor is cut along; meshes have up to five, and a box has 2^n corners to check."""


def _split_dimensions(shape: tuple[int, ...], boxes: Sequence[Box]) -> list[int]:
    """The dimensions that some box does not span."""
    return [d for d, size in enumerate(shape) if any(extent[d] != size for _, extent in boxes)]


def prove_cover(what: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Refuse boxes that do not fill the shape exactly once; linear in the boxes.

    The number of boxes over each element is 1 everywhere exactly where the signed corners of all boxes add
    up to those of the whole: both are the mixed differences, along every dimension, of that number.

    Raises:
        CorruptArchiveError: an overlap or a gap. LimitExceededError: cut along too many dimensions.
    """
    if 0 in shape:
        return
    split = _split_dimensions(shape, boxes)
    if len(split) > MAX_SPLIT_DIMENSIONS:
        raise LimitExceededError(f"{what}: cut along {len(split)} dimensions, at most {MAX_SPLIT_DIMENSIONS}")
    corners: Counter[tuple[int, ...]] = Counter()
    whole = ((0,) * len(shape), shape)
    for sign, (start, extent) in ((-1, whole), *((1, box) for box in boxes)):
        for ends in product((0, 1), repeat=len(split)):
            corner = tuple(start[d] + end * extent[d] for d, end in zip(split, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    if any(corners.values()):
        total = sum(math.prod(extent) for _, extent in boxes)
        raise CorruptArchiveError(
            f"{what} overlap or leave gaps: they hold {total} elements, the tensor {math.prod(shape)}"
        )


def prove_used(what: str, numel: int, views: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> None:
    """Refuse views of a dense tensor that do not show each of its elements exactly once.

    Args:
        views: (offset, extent, stride) in elements. The steps of all of them have to divide one another, as
            they do where axes of a tensor were split, reordered and cut.

    Raises:
        CorruptArchiveError: an element that no view shows, or that two show.
    """
    total = sum(math.prod(extent) for _, extent, _ in views)
    if total != numel:
        raise CorruptArchiveError(f"{what}: {total} of its {numel} elements would be used")
    if len(views) == 1 or not numel:
        return  # the elements of one view are distinct
    steps = sorted(
        {s for _, extent, stride in views for n, s in zip(extent, stride, strict=True) if n > 1} | {1}
    )
    if any(far % near for near, far in itertools.pairwise(steps)) or numel % steps[-1]:
        raise CorruptArchiveError(f"{what}: it is cut in a way that cannot be proven to use all of it once")
    steps.reverse()
    sizes = [numel // steps[0], *(far // near for far, near in itertools.pairwise(steps))]
    boxes = [box for view in views for box in _digit_boxes(steps, sizes, *view)]
    prove_cover(what, tuple(sizes), boxes)


def _digit_boxes(
    steps: Sequence[int], sizes: Sequence[int], offset: int, extent: tuple[int, ...], stride: tuple[int, ...]
) -> Iterator[Box]:
    """A view as boxes of digits, one digit for each step; cut where an axis carries into the next digit."""
    counts = [1] * len(steps)
    start = []
    rest = offset
    for step in steps:
        start.append(rest // step)
        rest %= step
    for n, s in zip(extent, stride, strict=True):
        if n > 1:
            counts[steps.index(s)] *= n
    yield from _carried(list(start), counts, sizes, len(steps) - 1)


def _carried(start: list[int], counts: list[int], sizes: Sequence[int], digit: int) -> Iterator[Box]:
    if digit <= 0:
        yield tuple(start), tuple(counts)
        return
    size, first, count = sizes[digit], start[digit], counts[digit]
    if first + count <= size:
        yield from _carried(start, counts, sizes, digit - 1)
        return
    if first == 0 and count % size == 0 and counts[digit - 1] == 1:
        whole = [*counts]
        whole[digit - 1 : digit + 1] = [count // size, size]
        yield from _carried(start, whole, sizes, digit - 1)
        return
    head = size - first
    yield from _carried(start, [*counts[:digit], head, *counts[digit + 1 :]], sizes, digit - 1)
    behind = [*start]
    behind[digit - 1 : digit + 1] = [start[digit - 1] + 1, 0]
    yield from _carried(behind, [*counts[:digit], count - head, *counts[digit + 1 :]], sizes, digit)
