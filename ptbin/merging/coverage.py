"""The proof that boxes fill a tensor: every element is in exactly one of them. Pure.

A box is (start, extent), in elements, one number for each dimension.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product

from ptbin.errors import CorruptArchiveError, LimitExceededError

__all__ = ["MAX_SPLIT_DIMENSIONS", "Box", "prove_cover", "split_dimensions"]

Box = tuple[tuple[int, ...], tuple[int, ...]]

MAX_SPLIT_DIMENSIONS = 6
"""Dimensions that a tensor is cut along; meshes have up to five, and a box has 2^n corners to check."""


def split_dimensions(shape: tuple[int, ...], boxes: Sequence[Box]) -> list[int]:
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
    split = split_dimensions(shape, boxes)
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
