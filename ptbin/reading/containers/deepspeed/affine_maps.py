"""DeepSpeed's affine maps: which block of a parameter lies where in each tensor-parallel rank's shard.

Source: deepspeed/checkpoint/affine.py (`ParamAffineMap`, version 1, 0.19). A piece gives its shape, and
offset and strides on both sides; blocks that several ranks hold must be equal. Where a map has a scale (a
bias that every rank holds divided by the number of ranks), the numbers are computed, as `rebuild` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedTensorError
from ptbin.merging.tiles import Box, Part, require_plain
from ptbin.merging.views import View, view_of
from ptbin.reading.containers.part_files import PartFiles
from ptbin.values.nodes import DictNode, entry_in, sizes_in
from ptbin.values.tensors import TensorRef, dense_strides

MAX_PIECES = 1 << 16


def whole_of_pieces(
    name: str, parts: Sequence[Part], entry: Any, where: str
) -> tuple[View, list[list[Part]]]:
    """The parameter that the ranks' pieces make, and the copies of pieces that have to be equal.

    Raises:
        CorruptArchiveError: the map and the shards contradict each other.
        UnsupportedTensorError: pieces that are not blocks of rows and columns.
    """
    what, shape, ranks = _read(name, parts, entry, where)
    boxes: list[Box] = []
    copies: dict[tuple[Any, ...], list[tuple[View, str]]] = {}
    for rank, part in enumerate(parts):
        row = ranks[rank]
        own = _sizes(entry_in(row, "shard_shape"), what)
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
            extent, at, start, _ = _piece(piece, shape, own, what)
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


def is_scaled(entry: Any) -> bool:
    """Whether some rank holds a block of the parameter multiplied by a number."""
    rows = [row for _, row in ranks.pairs] if isinstance(ranks := entry_in(entry, "ranks"), DictNode) else []
    pieces = [piece for row in rows for piece in _listed(entry_in(row, "pieces"))]
    return any(entry_in(piece, "scale") not in (None, 1, 1.0) for piece in pieces)


def scaled_whole(files: PartFiles, name: str, parts: Sequence[Part], entry: Any, where: str) -> TensorRef:
    """The parameter whose blocks the ranks hold scaled, computed: small tensors, in memory.

    Raises:
        CorruptArchiveError: the map and the shards contradict each other, or leave gaps.
        IncompleteCheckpointError: ranks hold different numbers for one block.
        UnsupportedTensorError: tensors of no floating numbers. LimitExceededError: more than fit in memory.
    """
    import numpy as np

    what, shape, ranks = _read(name, parts, entry, where)
    first = parts[0].tensor
    for part in parts:
        require_plain(part, name)
        if not files.small.can_read(part.tensor) or part.tensor.dtype != first.dtype:
            raise UnsupportedTensorError(f"{part.home}: {name[:200]!r} is scaled and of other numbers")
    if math.prod(shape) > sum(part.tensor.numel for part in parts):
        raise CorruptArchiveError(f"{what}: the shards are less than {list(shape)}")
    if not files.small.reserve(*(part.tensor for part in parts), *(part.tensor for part in parts)):
        files.small.refuse_too_many(name)
    wide = "f8" if first.dtype.name == "float64" else "f4"
    whole, holder = np.zeros(shape, wide), np.full(shape, -1, np.int32)
    for rank, part in enumerate(parts):
        own = _sizes(entry_in(ranks[rank], "shard_shape"), what)
        if math.prod(own) != part.tensor.numel:
            raise CorruptArchiveError(f"{what} gives {part.home} a shard of {list(own)}")
        shard = files.small.numbers(part.tensor).astype(wide).reshape(own)
        for piece in _listed(entry_in(ranks[rank], "pieces")):
            extent, at, start, scale = _piece(piece, shape, own, what)
            here = tuple(slice(a, a + n) for a, n in zip(at, extent, strict=True))
            found = shard[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))]
            if scale != 1:
                with np.errstate(all="ignore"):
                    found = files.small.rounded(found / found.dtype.type(scale), first.dtype)
            known = holder[here]
            if (known >= 0).any() and not ((known >= 0).all() and found.tobytes() == whole[here].tobytes()):
                other = parts[int(known.max())].home
                files.refuse(f"{name[:200]!r} should be the same in {other} and {part.home}, and differs")
            whole[here] = found
            holder[here] = rank
    if (holder < 0).any():
        raise CorruptArchiveError(f"{what} leaves gaps")
    made = files.small.tensor(name, whole, first.dtype)
    files.storages[f"computed/{name}"] = made.storage
    for part in parts:
        files.leave_out(part.home, [part.tensor], "scaled")
    return made


def _read(
    name: str, parts: Sequence[Part], entry: Any, where: str
) -> tuple[str, tuple[int, ...], dict[Any, Any]]:
    """For messages; the parameter's shape; what each rank holds."""
    what = f"{where}: affine map of {name[:200]!r}"
    shape = _sizes(entry_in(entry, "logical_shape"), what)
    ranks = dict(_pairs(entry_in(entry, "ranks"), what))
    if sorted(ranks, key=str) != sorted(range(len(parts)), key=str):
        raise CorruptArchiveError(f"{what} is over {len(ranks)} ranks, {len(parts)} are there")
    return what, shape, ranks


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) and len(value) <= MAX_PIECES else ()


def _piece(
    piece: Any, shape: tuple[int, ...], shard: tuple[int, ...], what: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], float]:
    """Extent, start in the whole, start in the shard, and the scale of the shard's numbers."""
    if not isinstance(piece, DictNode):
        raise CorruptArchiveError(f"{what}: a piece that is not a mapping")
    scale = piece.get("scale", 1.0)
    if type(scale) not in (int, float) or not math.isfinite(scale) or not scale:
        raise CorruptArchiveError(f"{what}: a piece is scaled by {str(scale)[:40]}")
    extent = _sizes(piece.get("shape"), what)
    starts = []
    for side, of in (("source", shape), ("dest", shard)):
        found = piece.get(side)
        if not isinstance(found, (list, tuple)) or len(found) != 2 or type(found[0]) is not int:
            raise CorruptArchiveError(f"{what}: a piece without {side}")
        strides = _sizes(found[1], what)
        dense = dense_strides(of)
        if len(extent) != len(of) or len(strides) != len(of):
            raise UnsupportedTensorError(f"{what}: a piece that is not a block of rows and columns")
        if any(n > 1 and a != b for n, a, b in zip(extent, strides, dense, strict=True)):
            raise UnsupportedTensorError(f"{what}: a piece that is not a block of rows and columns")
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
    return extent, starts[0], starts[1], float(scale)


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if (sizes := sizes_in(value)) is None:
        raise CorruptArchiveError(f"{what}: sizes that are not sizes")
    return sizes


def _pairs(value: Any, what: str) -> list[tuple[Any, Any]]:
    if not isinstance(value, DictNode):
        raise CorruptArchiveError(f"{what}: no mapping of ranks")
    return [(int(key) if type(key) is str and key.isdecimal() else key, row) for key, row in value.pairs]
