"""Where the piece that a rank holds of a distributed tensor lies in the whole: meshes and placements. Pure.

A mesh is a grid of ranks; a tensor has one placement for each of its dimensions. `Shard(d)` cuts dimension d
as `torch.chunk` does: pieces of ceil(n / count), the last ones shorter or empty. Cuts are made from the left
mesh dimension to the right, but where FSDP cut what tensor parallelism had cut before: `_StridedShard` on the
left then counts in `split_factor` the pieces there were, and `shard_order` (torch 2.10 and later) states the
order outright. `Replicate` changes nothing. A `Partial` is a summand and no piece.

Sources: torch/distributed/tensor/placement_types.py (`Shard`, `_StridedShard._split_tensor`),
_dtensor_spec.py (`shard_order`), device_mesh.py, _shard/sharded_tensor (2.2 to 2.14: `mesh` is a tensor up to
2.8, a layout and a `_rank_map` since).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptbin.values.nodes import DictNode, Instance
from ptbin.values.tensors import TensorRef

__all__ = [
    "Grid",
    "Grids",
    "Placement",
    "Run",
    "attributes_of",
    "grid_of",
    "placements_of",
    "runs_of",
    "stated_orders",
]

MAX_MESH_DIMENSIONS = 16
MAX_RANKS = 1 << 20
MAX_SPLIT_FACTOR = 1 << 14

Run = tuple[int, int]
"""First index and count along one dimension."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A device mesh, as one rank's file tells it.

    Attributes:
        shape: ranks along each dimension.
        coordinate: of the rank that wrote the file; None where it does not say.
        ranks: every rank of the mesh; None where the file keeps them in a tensor.
        world: every rank of the mesh that this one may be a slice of.
    """

    shape: tuple[int, ...]
    coordinate: tuple[int, ...] | None
    ranks: frozenset[int] | None = None
    world: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Placement:
    """What one mesh dimension does to a tensor: `dim` is cut; None where the piece is the same all along it.

    Attributes:
        split_factor: pieces that `dim` was in before this cut; 1 for a plain `Shard`.
    """

    dim: int | None = None
    split_factor: int = 1


def attributes_of(value: Any) -> DictNode:
    """Of a record or a state: `(None, mapping)` is how classes with slots are pickled (copyreg)."""
    state = value.state if isinstance(value, Instance) else value
    if isinstance(state, tuple) and len(state) == 2:
        state = next((part for part in state if isinstance(part, DictNode)), None)
    return state if isinstance(state, DictNode) else DictNode()


def grid_of(mesh: Any) -> Grid | None:
    """The `DeviceMesh` record as a grid; None where it has no shape that can be read."""
    attributes = attributes_of(mesh)
    shape = _shape_of(attributes)
    if shape is None or len(shape) > MAX_MESH_DIMENSIONS or not 0 < math.prod(shape) <= MAX_RANKS:
        return None
    found = attributes.get("_coordinate_on_dim")
    coordinate = tuple(found) if isinstance(found, (list, tuple)) else None
    if coordinate is not None and (
        len(coordinate) != len(shape)
        or not all(type(c) is int and 0 <= c < n for c, n in zip(coordinate, shape, strict=True))
    ):
        return None
    ranks, world = _ranks_of(attributes, shape)
    return Grid(shape, coordinate, ranks, world)


class Grids:
    """Grids of meshes that were seen before: all tensors of a file have one or two, and each asks."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Grid | None]] = {}

    def of(self, mesh: Any) -> Grid | None:
        """As `grid_of`."""
        found = self._known.get(id(mesh))
        if found is None:
            # Holding the mesh keeps its identity from being given to another one.
            found = self._known[id(mesh)] = (mesh, grid_of(mesh))
        return found[1]

    def forget(self) -> None:
        """Let go of all meshes: the file that they were in has been read."""
        self._known.clear()


def _ranks_of(attributes: DictNode, shape: tuple[int, ...]) -> tuple[frozenset[int] | None, frozenset[int]]:
    """Ranks of the mesh, and of the one it is a slice of, where the file has both as plain numbers (2.9)."""
    world, rank = attributes.get("_flatten_rank_map"), attributes.get("_rank")
    if not isinstance(world, tuple) or len(world) > MAX_RANKS or not all(type(n) is int for n in world):
        return None, frozenset()
    if math.prod(shape) == len(world):
        return frozenset(world), frozenset(world)
    # A slice: its own rank fixes where in the whole the layout's steps begin.
    axes = attributes_of(attributes.get("_layout")).get("axes")
    if rank not in world or not isinstance(axes, (tuple, list)):
        return None, frozenset()
    found = attributes.get("_coordinate_on_dim")
    start = world.index(rank)
    offsets = [0]
    for axis, own in zip(axes, found if isinstance(found, (tuple, list)) else (), strict=True):
        layout = attributes_of(axis)
        along = [0]
        for n, step in zip(_flat(layout.get("shape")), _flat(layout.get("stride")), strict=True):
            along = [place + i * step for place in along for i in range(n)]
        start -= along[own]
        offsets = [offset + step for offset in offsets for step in along]
    places = [start + offset for offset in offsets]
    if not all(0 <= place < len(world) for place in places):
        return None, frozenset()
    return frozenset(world[place] for place in places), frozenset(world)


def _flat(value: Any) -> tuple[int, ...]:
    """A number, or a tuple of numbers, as a tuple."""
    found = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(found) if all(type(n) is int and 0 <= n <= MAX_RANKS for n in found) else ()


def _shape_of(attributes: DictNode) -> tuple[int, ...] | None:
    layout = attributes_of(attributes.get("_layout"))
    axes = layout.get("axes")
    if isinstance(axes, (tuple, list)):  # 2.13 and later
        return _sizes([attributes_of(axis).get("shape") for axis in axes])
    shape = layout.get("shape")
    if shape is not None:
        return _sizes(shape if isinstance(shape, (tuple, list)) else [shape])
    for name in ("mesh", "_mesh"):
        tensor = attributes.get(name)
        if isinstance(tensor, TensorRef):
            return tensor.shape
    return None


def _sizes(values: Sequence[Any]) -> tuple[int, ...] | None:
    """Of each mesh dimension, which may be nested itself (a flattened one)."""
    if len(values) > MAX_MESH_DIMENSIONS:
        return None
    found = [_product(value) for value in values]
    return None if None in found else tuple(n for n in found if n is not None)


def _product(value: Any) -> int | None:
    if type(value) is int:
        return value if 0 < value <= MAX_RANKS else None
    if not isinstance(value, (tuple, list)) or len(value) > MAX_MESH_DIMENSIONS:
        return None
    found = [_product(item) for item in value]
    return None if None in found else math.prod(n for n in found if n is not None)


def placements_of(spec: DictNode, dimensions: int) -> tuple[Placement, ...] | str:
    """The placements of a `DTensorSpec`, or why there are none that put a piece into its place."""
    found = spec.get("placements")
    if not isinstance(found, (tuple, list)):
        return "it has no placements"
    placements = []
    for item in found:
        name = item.class_path.rpartition(".")[2] if isinstance(item, Instance) else type(item).__name__
        if name == "Replicate":
            placements.append(Placement())
            continue
        if name not in ("Shard", "_StridedShard"):
            kind = (
                "a summand of the whole" if "Partial" in name else "placed in a way that ptbin does not know"
            )
            return f"it is {kind} ({name[:80]}); save it as `full_tensor()` gives it"
        attributes = attributes_of(item)
        dim, factor = attributes.get("dim"), attributes.get("split_factor", 1)
        if type(dim) is not int or type(factor) is not int or not 0 < factor <= MAX_SPLIT_FACTOR:
            return "its placement says no dimension"
        dim = dim + dimensions if dim < 0 else dim
        if not 0 <= dim < dimensions:
            return f"it is cut along dimension {dim} of {dimensions}"
        placements.append(Placement(dim, factor if name == "_StridedShard" else 1))
    return tuple(placements)


def stated_orders(spec: DictNode) -> dict[int, tuple[int, ...]]:
    """Tensor dimension to mesh dimensions in the order in which they cut it, where the spec says so."""
    orders = {}
    entries = spec.get("shard_order")
    for entry in entries if isinstance(entries, (tuple, list)) else ():
        fields = entry.args if isinstance(entry, Instance) else entry
        if isinstance(fields, tuple) and len(fields) == 2 and isinstance(fields[1], (tuple, list)):
            orders[fields[0]] = tuple(fields[1])
    return {dim: order for dim, order in orders.items() if all(type(n) is int for n in (dim, *order))}


def runs_of(
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: Sequence[Placement],
    orders: Mapping[int, tuple[int, ...]],
    *,
    strided: bool = False,
) -> list[list[Run]] | None:
    """For every dimension the runs of indices that the rank holds, in order.

    There are two readings where a dimension is cut unevenly and strided: torch's tensor parallelism cuts
    first and FSDP then cuts what is left; `_StridedShard._split_tensor` (`strided`) deals out pieces of
    ceil(n / all pieces). A caller takes the one that the pieces' sizes agree with. None where placements
    that count other pieces than there are cannot be read in order.
    """
    found = []
    for dim, size in enumerate(shape):
        cuts = [index for index, placement in enumerate(placements) if placement.dim == dim]
        if not cuts:
            found.append([(0, size)])
        elif strided:
            found.append(_cut_strided(size, cuts, grid, coordinate, placements))
        else:
            stated = orders.get(dim)
            order = (
                stated if stated is not None and sorted(stated) == cuts else _order(cuts, grid, placements)
            )
            if order is None:
                return None
            found.append(_cut_in_order(size, order, grid, coordinate))
    return found


def _order(
    cuts: Sequence[int], grid: tuple[int, ...], placements: Sequence[Placement]
) -> tuple[int, ...] | None:
    """Mesh dimensions in the order in which they cut: a strided one comes behind those it counts."""
    order: list[int] = []
    for index in reversed(cuts):
        pieces, place = 1, 0
        while pieces < placements[index].split_factor and place < len(order):
            pieces *= grid[order[place]]
            place += 1
        if pieces != placements[index].split_factor:
            return None
        order.insert(place, index)
    return tuple(order)


def _cut_in_order(
    size: int, order: Sequence[int], grid: tuple[int, ...], coordinate: tuple[int, ...]
) -> list[Run]:
    first, count = 0, size
    for index in order:
        begin, taken = _chunk(count, grid[index], coordinate[index])
        first, count = first + begin, taken
    return [(first, count)]


def _chunk(size: int, pieces: int, index: int) -> Run:
    """As `torch.chunk`: pieces of the rounded-up size until nothing is left."""
    most = -(-size // pieces)
    begin = min(index * most, size)
    return begin, min(most, size - begin)


def _cut_strided(
    size: int,
    cuts: Sequence[int],
    grid: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: Sequence[Placement],
) -> list[Run]:
    """From left to right; a strided cut takes every n-th of the pieces (`_StridedShard._split_tensor`)."""
    runs: list[Run] = [(0, size)]
    for index in cuts:
        total = sum(count for _, count in runs)
        ranks, factor = grid[index], placements[index].split_factor
        pieces = [_chunk(total, ranks * factor, coordinate[index] + ranks * turn) for turn in range(factor)]
        runs = [run for begin, count in pieces for run in _within(runs, begin, count)]
    return _fused(runs)


def _within(runs: Sequence[Run], begin: int, count: int) -> Iterator[Run]:
    """The part of a sequence of runs from its `begin`-th index on."""
    position = 0
    for first, length in runs:
        low, high = max(begin, position), min(begin + count, position + length)
        if low < high:
            yield first + low - position, high - low
        position += length


def _fused(runs: Sequence[Run]) -> list[Run]:
    found: list[Run] = []
    for first, count in runs:
        if found and sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((first, count))
    return found or [(0, 0)]
