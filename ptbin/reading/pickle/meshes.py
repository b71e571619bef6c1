"""The device mesh of a distributed tensor, as one rank's file tells it. Pure.

A mesh is a grid of ranks. Source: torch/distributed/device_mesh.py. Torch 2.2 to 2.9 have the ranks in a
tensor `mesh`; 2.10 and later a `_layout` over the ranks of the whole mesh (`_flatten_rank_map`): sizes and
steps up to 2.12 (`shape`, `stride`), `axes` of them since.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptbin.values.nodes import DictNode, Instance
from ptbin.values.tensors import TensorRef

MAX_MESH_DIMENSIONS = 16
MAX_RANKS = 1 << 20


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
    """Ranks of the mesh, and of the one it is a slice of, where the file has them as plain numbers.

    2.2 to 2.10 list the mesh's own (`_flatten_mesh_list`), 2.10 and later those of the whole mesh
    (`_flatten_rank_map`), of which a slice is found by its layout and own rank.
    """
    own = _ranks_in(attributes.get("_flatten_mesh_list"))
    ranks = frozenset(own) if len(own) == math.prod(shape) else None
    whole = _ranks_in(attributes.get("_flatten_rank_map"))
    world = frozenset(whole)
    if not whole or ranks is not None:
        return ranks, world
    if math.prod(shape) == len(whole):
        return world, world
    rank, coordinate = attributes.get("_rank"), attributes.get("_coordinate_on_dim")
    axes = _axes_of(attributes_of(attributes.get("_layout")))
    if rank not in world or not isinstance(coordinate, (tuple, list)) or len(coordinate) != len(axes):
        return None, frozenset()
    # A slice: its own rank fixes where in the whole the layout's steps begin.
    start = whole.index(rank)
    offsets = [0]
    for (sizes, steps), place in zip(axes, coordinate, strict=True):
        along = [0]
        for n, step in zip(sizes, steps, strict=False):
            along = [before + i * step for before in along for i in range(n)]
        if type(place) is not int or not 0 <= place < len(along):
            return None, frozenset()
        start -= along[place]
        offsets = [offset + step for offset in offsets for step in along]
    places = [start + offset for offset in offsets]
    if not all(0 <= place < len(whole) for place in places):
        return None, frozenset()
    return frozenset(whole[place] for place in places), world


def _ranks_in(value: Any) -> tuple[int, ...]:
    plain = isinstance(value, tuple) and len(value) <= MAX_RANKS and all(type(n) is int for n in value)
    return value if plain else ()


def _axes_of(layout: DictNode) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Sizes and steps of each mesh dimension: `axes` since 2.13, `shape` and `stride` before."""
    axes = layout.get("axes")
    if isinstance(axes, (tuple, list)):
        rows = [(attributes_of(axis).get("shape"), attributes_of(axis).get("stride")) for axis in axes]
    else:
        shape, stride = layout.get("shape"), layout.get("stride")
        shape, stride = (value if isinstance(value, (tuple, list)) else (value,) for value in (shape, stride))
        rows = list(zip(shape, stride, strict=False))
    return [(_flat(sizes), _flat(steps)) for sizes, steps in rows]


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
