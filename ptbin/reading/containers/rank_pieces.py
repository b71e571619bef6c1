"""What one rank's file says of each tensor: a copy, a piece of a DTensor, or shards of a ShardedTensor.

A DTensor says where its piece lies by its mesh and placements (`meshes`, `placements`), a ShardedTensor has
the offsets of all shards. Everything is checked against the local tensor that comes with it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from ptbin.errors import CorruptArchiveError, LimitExceededError, UnsupportedTensorError
from ptbin.merging.tiles import Box, Part, require_plain
from ptbin.reading.containers.part_files import PartFiles
from ptbin.reading.pickle.meshes import Grid, attributes_of
from ptbin.reading.pickle.placements import (
    Interpretation,
    Placement,
    interpretations_of,
    placements_of,
    stated_orders,
)
from ptbin.reading.pickle.wrappers import DTENSOR, SHARDED_TENSOR
from ptbin.values.dtypes import DType, dtype_by_name
from ptbin.values.nodes import Opaque, sizes_in
from ptbin.values.tensors import TensorRef, dense_strides

Path = tuple[Any, ...]
_NUMBER = re.compile(r"\d+(?=(?:[._-]of[._-]\d+)?\D*$)")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a DTensor lies on its mesh; equal in every file that holds a piece of it."""

    shape: tuple[int, ...]
    dtype: DType
    grid: tuple[int, ...]
    placements: tuple[Placement, ...]
    orders: tuple[tuple[int, tuple[int, ...]], ...]
    interpretations: tuple[Interpretation, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One rank's piece of a DTensor."""

    layout: Layout
    coordinate: tuple[int, ...]
    part: Part


@dataclass(frozen=True, slots=True)
class Shards:
    """One rank's shards of a ShardedTensor, and where all shards are said to lie."""

    shape: tuple[int, ...]
    dtype: DType
    everything: frozenset[tuple[tuple[int, ...], tuple[int, ...]]]
    boxes: tuple[Box, ...]
    home: str


class RankPieces:
    """Reads the tensors of one file after the other.

    Attributes:
        covered: ranks of the meshes that were seen.
        world: ranks of the meshes that those are slices of.
    """

    def __init__(self, files: PartFiles, count: int) -> None:
        self.files = files
        self.count = count
        self.covered: set[int] = set()
        self.world: set[int] = set()
        self._grids: dict[int, Grid] = {}
        self._layouts: dict[Layout, Layout] = {}

    def begin_file(self) -> None:
        """Forget the meshes of the file before."""
        self._grids.clear()

    def read(self, value: Any, name: str, path: Path) -> Part | Piece | Shards | None:
        """A tensor of a file, plain or distributed; None for anything else.

        Raises:
            UnsupportedTensorError: summands (`Partial`), meshes and placements that cannot be read.
            CorruptArchiveError: pieces that are not what they say.
        """
        if isinstance(value, TensorRef):
            return Part(value, name)
        if not isinstance(value, Opaque) or not isinstance(value.contents, tuple) or len(value.contents) != 2:
            return None
        args, state = value.contents
        if value.kind == DTENSOR:
            return self._dtensor(args, state, name, path)
        return self._sharded(args, state, name, path) if value.kind == SHARDED_TENSOR else None

    def _dtensor(self, args: Any, state: Any, name: str, path: Path) -> Piece:
        attributes = attributes_of(state)
        local, spec = attributes.get("_local_tensor"), attributes_of(attributes.get("_spec"))
        shape = self._sizes(args[2] if isinstance(args, tuple) and len(args) > 2 else None, name, path)
        if not isinstance(local, TensorRef):
            self.unsupported(name, path, "a distributed tensor whose local part is not a plain tensor")
        part = Part(local, name)
        require_plain(part, label_of(path))
        mesh = spec.get("mesh")
        grid = self._grids.get(id(mesh))
        if grid is None:
            found = self.files.opening.vocabulary.grids.of(mesh)
            if found is None:
                self.unsupported(name, path, "a distributed tensor whose device mesh cannot be read")
            grid = self._grids[id(mesh)] = found
            self.note(grid)
            self.files.opening.vocabulary.placements.append(mesh)  # holds a tensor of ranks itself
        placements = placements_of(spec, len(shape))
        if isinstance(placements, str):
            self.unsupported(name, path, f"a distributed tensor, and {placements}")
        if len(placements) != len(grid.shape):
            self.unsupported(name, path, "a distributed tensor with other placements than mesh dimensions")
        orders = tuple(sorted(stated_orders(spec).items()))
        interpretations = interpretations_of(spec, placements)
        layout = Layout(shape, local.dtype, grid.shape, placements, orders, interpretations)
        layout = self._layouts.setdefault(layout, layout)
        coordinate = grid.coordinate
        if coordinate is None:
            number = number_in(name)
            if math.prod(grid.shape) != self.count or not 0 <= number < self.count:
                self.unsupported(name, path, "a distributed tensor, and the file does not say of which rank")
            coordinate = tuple(
                number // step % n for n, step in zip(grid.shape, dense_strides(grid.shape), strict=True)
            )
        return Piece(layout, coordinate, part)

    def note(self, grid: Grid | None) -> None:
        """Ranks whose pieces there have to be, and those whose pieces are here."""
        if grid is not None and grid.ranks is not None:
            self.covered |= grid.ranks
            self.world |= grid.world

    def _sharded(self, args: Any, state: Any, name: str, path: Path) -> Shards:
        if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[0], (list, tuple)):
            self.unsupported(name, path, "a ShardedTensor whose state is unknown")
        metadata = attributes_of(state[1])
        listed = metadata.get("shards_metadata")
        if not isinstance(listed, (list, tuple)):
            self.unsupported(name, path, "a ShardedTensor that does not list its shards")
        if len(listed) > self.files.folder.limits.tensors:
            raise LimitExceededError(
                f"{self.files.uri}: {name} lists {len(listed)} shards of one tensor", limit="tensors"
            )
        shape = self._sizes(metadata.get("size"), name, path)
        everything = frozenset(self._shard_box(item, len(shape), name, path) for item in listed)
        boxes = []
        dtype = None
        for shard in state[0]:
            attributes = attributes_of(shard)
            local = attributes.get("tensor")
            if not isinstance(local, TensorRef):
                self.unsupported(name, path, "a ShardedTensor whose shard is not a plain tensor")
            start, extent = self._shard_box(attributes.get("metadata"), len(shape), name, path)
            if local.shape != extent:
                self.damaged(name, path, f"a shard of {list(local.shape)}, which should be {list(extent)}")
            part = Part(local, name)
            require_plain(part, label_of(path))
            dtype = local.dtype
            boxes.append(Box(part, start, extent, 0, local.stride))
        named = (
            args[1].name if isinstance(args, tuple) and len(args) > 1 and hasattr(args[1], "name") else None
        )
        if dtype is None:
            dtype = dtype_by_name(named) if isinstance(named, str) else None
            if dtype is None:
                self.unsupported(name, path, "a ShardedTensor of an unknown type")
        return Shards(shape, dtype, everything, tuple(boxes), name)

    def _shard_box(
        self, metadata: Any, dimensions: int, name: str, path: Path
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        attributes = attributes_of(metadata)
        start = self._sizes(attributes.get("shard_offsets"), name, path)
        extent = self._sizes(attributes.get("shard_sizes"), name, path)
        if len(start) != dimensions or len(extent) != dimensions:
            self.damaged(name, path, f"a shard of other than {dimensions} dimensions")
        return start, extent

    def _sizes(self, value: Any, name: str, path: Path) -> tuple[int, ...]:
        if (sizes := sizes_in(value)) is None:
            self.damaged(name, path, "sizes that are not sizes")
        return sizes

    def unsupported(self, name: str, path: Path, why: str) -> NoReturn:
        """Raise UnsupportedTensorError."""
        raise UnsupportedTensorError(f"{self.files.uri}: {name}: {label_of(path)!r} is {why}")

    def damaged(self, name: str, path: Path, what: str) -> NoReturn:
        """Raise CorruptArchiveError."""
        raise CorruptArchiveError(f"{self.files.uri}: {name}: {label_of(path)!r} has {what}")


def label_of(path: Path) -> str:
    """The dotted name of a tensor."""
    return ".".join(str(step) for step in path)[:200]


def number_in(name: str) -> int:
    """The last number in a file's name, of `1-of-4` the first; -1 for a name without digits."""
    found = _NUMBER.search(name)
    return int(found[0]) if found else -1


def describe_layout(layout: Layout) -> str:
    """For messages."""
    cuts = [
        "replicated" if placement.dim is None else f"cut along dimension {placement.dim}"
        for placement in layout.placements
    ]
    return f"{layout.dtype.name} {list(layout.shape)}, {', '.join(cuts)} on a mesh of {list(layout.grid)}"


def with_number(name: str, number: int) -> str:
    """The file's name with another number, as wide as before where that began with zeros."""
    return _NUMBER.sub(lambda old: str(number).zfill(len(old[0]) if old[0][0] == "0" else 1), name, count=1)
