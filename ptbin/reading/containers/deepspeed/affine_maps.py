"""DeepSpeed's affine maps: which block of a parameter lies where in each tensor-parallel rank's shard.

Source: deepspeed/checkpoint/affine.py (`ParamAffineMap`, version 1, 0.19). A piece gives its shape, and
offset
and strides on both sides; blocks that several ranks hold have to be equal. A scale is arithmetic and refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedTensorError
from ptbin.merging.tiles import Box, Part
from ptbin.merging.views import View, view_of
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import dense_strides

__all__ = ["whole_of_pieces"]

MAX_EXTENT = 1 << 48
MAX_PIECES = 1 << 16


def whole_of_pieces(
    name: str, parts: Sequence[Part], entry: Any, where: str
) -> tuple[View, list[list[Part]]]:
    """The parameter that the ranks' pieces make, and the copies of pieces that have to be equal.

    Raises:
        CorruptArchiveError: the map and the shards contradict each other.
        UnsupportedTensorError: scaled pieces, or pieces that are no blocks of rows and columns.
    """
    what = f"{where}: affine map of {name[:200]!r}"
    shape = _sizes(entry.get("logical_shape") if isinstance(entry, DictNode) else None, what)
    ranks = dict(_pairs(entry.get("ranks"), what))
    if sorted(ranks, key=str) != sorted(range(len(parts)), key=str):
        raise CorruptArchiveError(f"{what} is over {len(ranks)} ranks, {len(parts)} are there")
    boxes: list[Box] = []
    copies: dict[tuple[Any, ...], list[tuple[View, str]]] = {}
    for rank, part in enumerate(parts):
        row = ranks[rank]
        own = _sizes(row.get("shard_shape") if isinstance(row, DictNode) else None, what)
        shard = view_of(part.tensor, part.home)
        if math.prod(own) != math.prod(shard.shape):
            raise CorruptArchiveError(
                f"{what} gives {part.home} a shard of {list(own)}, it has {list(shard.shape)}"
            )
        if own != shard.shape:
            shard = shard.reshaped(own)
        pieces = row.get("pieces")
        if not isinstance(pieces, (list, tuple)) or len(pieces) > MAX_PIECES:
            raise CorruptArchiveError(f"{what}: no list of pieces")
        held = 0
        for piece in pieces:
            extent, at, start = _piece(piece, shape, own, what)
            held += math.prod(extent)
            if 0 in extent:
                continue
            view = shard
            for axis, (first, count) in enumerate(zip(start, extent, strict=True)):
                view = view.taken(axis, first, count) if count != view.shape[axis] else view
            copies.setdefault((at, extent), []).append((view, part.home))
        if held != math.prod(own):
            raise CorruptArchiveError(
                f"{what}: the pieces of rank {rank} are {held} of {math.prod(own)} elements"
            )
    groups = []
    for (at, _), found in copies.items():
        moved = (
            replace(box, start=tuple(a + b for a, b in zip(box.start, at, strict=True)))
            for box in found[0][0].boxes
        )
        boxes.extend(moved)
        if len(found) > 1:
            groups.append([Part(view.tensor(what, name), home) for view, home in found])
    return View(parts[0].tensor.dtype, shape, tuple(boxes)), groups


def _piece(
    piece: Any, shape: tuple[int, ...], shard: tuple[int, ...], what: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Extent, start in the whole and start in the shard."""
    if not isinstance(piece, DictNode):
        raise CorruptArchiveError(f"{what}: a piece that is none")
    if piece.get("scale") not in (None, 1, 1.0):
        raise UnsupportedTensorError(f"{what}: a piece is scaled, which is arithmetic and not merged")
    extent = _sizes(piece.get("shape"), what)
    starts = []
    for side, of in (("source", shape), ("dest", shard)):
        found = piece.get(side)
        if not isinstance(found, (list, tuple)) or len(found) != 2 or type(found[0]) is not int:
            raise CorruptArchiveError(f"{what}: a piece without {side}")
        strides = _sizes(found[1], what)
        dense = dense_strides(of)
        if len(extent) != len(of) or len(strides) != len(of):
            raise UnsupportedTensorError(f"{what}: a piece that is no block of rows and columns")
        if any(n > 1 and a != b for n, a, b in zip(extent, strides, dense, strict=True)):
            raise UnsupportedTensorError(f"{what}: a piece that is no block of rows and columns")
        start, rest = [], found[0]
        for step, size in zip(dense, of, strict=True):
            index = min(rest // step, max(size - 1, 0)) if step else 0
            start.append(index)
            rest -= index * step
        empty = 0 in extent
        if not empty and (
            rest or any(s < 0 or s + n > size for s, n, size in zip(start, extent, of, strict=True))
        ):
            raise CorruptArchiveError(
                f"{what}: a piece of {list(extent)} at {found[0]} lies outside of {list(of)}"
            )
        starts.append(tuple(start))
    return extent, starts[0], starts[1]


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if (
        not isinstance(value, (list, tuple))
        or len(value) > 64
        or not all(type(n) is int and 0 <= n < MAX_EXTENT for n in value)
    ):
        raise CorruptArchiveError(f"{what}: sizes that are not sizes")
    return tuple(value)


def _pairs(value: Any, what: str) -> list[tuple[Any, Any]]:
    if not isinstance(value, DictNode):
        raise CorruptArchiveError(f"{what}: no mapping of ranks")
    return [(int(key) if type(key) is str and key.isdecimal() else key, row) for key, row in value.pairs]
