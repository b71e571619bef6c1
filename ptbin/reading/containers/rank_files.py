"""Every rank's own file of one state dict: pieces of DTensors and ShardedTensors put together.

verl, SkyRL and EasyR1 save so (`model_world_size_8_rank_3.pt`), and so does any call of `torch.save` on each
rank's state dict under FSDP or tensor parallelism. A DTensor says in the file itself where its piece lies
(`rank_pieces`), a ShardedTensor has the offsets. A plain tensor is a copy that every rank has, as torch's own
state dicts hold buffers: one is taken, the others must be equal. Files in which nothing is distributed are
refused: whether they are copies or pieces, nothing says.

Costs: the index of each file. Memory: of each file what describes its pieces, one small record a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NoReturn

from ptbin.merging.tiles import Box, Part
from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.part_files import PartFiles, Pieces, Tree
from ptbin.reading.containers.rank_pieces import (
    Layout,
    Path,
    Piece,
    RankPieces,
    Shards,
    describe_layout,
    label_of,
    number_in,
    with_number,
)
from ptbin.reading.pickle.meshes import attributes_of, grid_of
from ptbin.reading.pickle.placements import runs_of
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import TensorRef, dense_strides

MAX_DEPTH = 16
MAX_SHOWN = 3


def read_rank_files(folder: Folder) -> Checkpoint:
    """Index the files of all ranks.

    Raises:
        IncompleteCheckpointError: a rank's piece is missing, files are of different saves, or nothing says
            how they belong together.
        UnsupportedTensorError: summands (`Partial`), placements that cannot be put in order.
        CorruptArchiveError: pieces that are not what they say.
    """
    return _Ranks(folder).read()


class _Ranks:
    def __init__(self, folder: Folder) -> None:
        self.files = PartFiles(folder, placed_by_name=False)
        self.names = sorted(folder.reader.names, key=number_in)
        self.pieces = RankPieces(self.files, len(self.names))
        self.found: dict[Path, list[Any]] = {}

    def read(self) -> Checkpoint:
        root: DictNode | None = None
        for name in self.names:
            known = len(self.files.opening.vocabulary.placements)
            own = self.files.open(name).root
            # Of DTensors that their meshes call whole here: they came as plain tensors.
            for spec in self.files.opening.vocabulary.placements[known:]:
                self.pieces.note(grid_of(attributes_of(spec).get("mesh")))
            if not isinstance(own, DictNode):
                self.files.refuse(
                    f"{name} holds a {type(own).__name__}, and no state dict; save `model.state_dict()` on "
                    "each rank, or convert one file with --parts"
                )
            self.pieces.begin_file()
            self.files.leave_out(name, self._take(own, name, is_first=root is None))
            self.files.opening.vocabulary.grids.forget()
            root = own if root is None else root
        assert root is not None
        if not self.files.opening.vocabulary.placements and not any(
            isinstance(piece, Shards) for pieces in self.found.values() for piece in pieces
        ):
            self.files.refuse(
                f"{len(self.names)} files of ranks ({_listed(self.names)}), and nothing in them "
                "says how they make a whole: merge them with the tool of the framework that wrote them, "
                "or, where each is a whole copy, convert one with --parts"
            )
        self._refuse_absent_ranks()
        tree = Tree(root)
        for path, pieces in self.found.items():
            tree.put(path, self._whole(path, pieces))
        return self.files.checkpoint("torch_ranks", root)

    # -- one file ------------------------------------------------------------------------------------

    def _take(self, root: DictNode, name: str, *, is_first: bool) -> Iterator[Any]:
        """Note every tensor of a file; yields what else it holds, if it is not the first one."""
        stack: list[tuple[Path, DictNode]] = [((), root)]
        seen = {id(root)}  # mappings may hold one another
        while stack:
            path, node = stack.pop()
            below = []
            for key, value in node.pairs:
                own = (*path, key)
                if isinstance(value, DictNode) and len(path) < MAX_DEPTH:
                    if id(value) not in seen:
                        seen.add(id(value))
                        below.append((own, value))
                    continue
                if type(key) in (str, int) and (piece := self.pieces.read(value, name, own)) is not None:
                    self.found.setdefault(own, []).append(piece)
                elif not is_first:
                    yield value
            stack.extend(reversed(below))

    # -- one tensor of all files ---------------------------------------------------------------------

    def _whole(self, path: Path, pieces: list[Any]) -> TensorRef:
        first = pieces[0]
        if any(type(piece) is not type(first) for piece in pieces):
            homes = ", ".join(_home(piece) for piece in (first, pieces[-1]))
            self.files.refuse(f"{label_of(path)!r} is distributed in one of {homes} and plain in the other")
        if isinstance(first, Part):
            return self.files.take_first(label_of(path), pieces)
        return self._of_shards(path, pieces) if isinstance(first, Shards) else self._of_mesh(path, pieces)

    def _of_mesh(self, path: Path, pieces: list[Piece]) -> TensorRef:
        first = pieces[0]
        for piece in pieces:
            if piece.layout is not first.layout:
                self.files.refuse(
                    f"{label_of(path)!r} is {describe_layout(first.layout)} in {first.part.home} and "
                    f"{describe_layout(piece.layout)} in {piece.part.home}: the files are not of one save"
                )
            if not piece.part.tensor.numel:
                # torch saves an empty view with all of the storage that it is a view of
                self.files.leave_out(piece.part.home, [piece.part.tensor], "unviewed")
        layout = first.layout
        fitting = [_distinct(boxes) for boxes in self._interpretations(layout, pieces)]
        if not fitting:
            self._refuse_local_shape(path, pieces)
        complete = next((found for found in fitting if _numel(found) == math.prod(layout.shape)), None)
        if complete is None:
            self._refuse_missing(path, layout, pieces)
        return self.files.assemble(label_of(path), layout.dtype, layout.shape, complete)

    def _interpretations(self, layout: Layout, pieces: list[Piece]) -> Iterator[list[list[Box]]]:
        """The boxes of each piece, for each way to read the placements that agrees with the pieces' sizes."""
        orders = dict(layout.orders)
        for reading in layout.interpretations:
            runs = [
                runs_of(layout.shape, layout.grid, piece.coordinate, layout.placements, orders, reading)
                for piece in pieces
            ]
            if None not in runs and (boxes := self._boxes(runs, pieces)) is not None:
                yield boxes

    def _boxes(self, runs: list[Any], pieces: list[Piece]) -> list[list[Box]] | None:
        """Boxes of each piece; None where one has another shape than its place."""
        found = []
        for piece, dims in zip(pieces, runs, strict=True):
            local = piece.part.tensor
            if tuple(sum(n for _, n in dim) for dim in dims) != local.shape:
                return None
            boxes = []
            for choice in product(*(list(_with_position(dim)) for dim in dims)):
                offset = sum(at * step for (_, _, at), step in zip(choice, local.stride, strict=True))
                start, extent = tuple(c[0] for c in choice), tuple(c[1] for c in choice)
                boxes.append(Box(piece.part, start, extent, offset, local.stride))
            found.append(boxes)
        return found

    def _of_shards(self, path: Path, pieces: list[Shards]) -> TensorRef:
        first = pieces[0]
        found: Pieces = {}
        for piece in pieces:
            if (piece.shape, piece.everything) != (first.shape, first.everything):
                self.files.refuse(
                    f"{label_of(path)!r} is cut otherwise in {piece.home} than in {first.home}: the files "
                    "are not of one save"
                )
            for box in piece.boxes:
                if 0 in box.shape:
                    self.files.leave_out(piece.home, [box.part.tensor], "unviewed")
                else:
                    found.setdefault(((box.start, box.shape),), []).append([box])
        missing = sorted(box for box in first.everything if 0 not in box[1] and (box,) not in found)
        if missing:
            self.files.refuse(
                f"{len(missing)} of {len(first.everything)} shards of {label_of(path)!r} are in none of "
                f"{len(self.names)} files ({_listed(self.names)}): that at {list(missing[0][0])}, say; fetch "
                f"the rest{self._absent(range(len(first.everything)))}"
            )
        dtypes = {box.part.tensor.dtype.name for own in found.values() for boxes in own for box in boxes}
        if len(dtypes) > 1:
            self.files.refuse(f"{label_of(path)!r} is of several types in different files: {sorted(dtypes)}")
        return self.files.assemble(label_of(path), first.dtype, first.shape, found)

    def _refuse_absent_ranks(self) -> None:
        """Refuse where ranks of the mesh hold tensors that no file mentions: a stage of a pipeline, say."""
        if absent := sorted(self.pieces.world - self.pieces.covered):
            self.files.refuse(
                f"it was saved on {len(self.pieces.world)} ranks, and what {len(absent)} of them hold is in "
                f"none of {len(self.names)} files{self._absent(absent)}; fetch all files of this save"
            )

    # -- refusals --------------------------------------------------------------------------------------

    def _refuse_missing(self, path: Path, layout: Layout, pieces: list[Piece]) -> NoReturn:
        known = {piece.coordinate for piece in pieces}
        steps = dense_strides(layout.grid)
        absent = [
            sum(c * step for c, step in zip(coordinate, steps, strict=True))
            for coordinate in product(*(range(n) for n in layout.grid))
            if coordinate not in known
        ]
        self.files.refuse(
            f"{label_of(path)!r} is cut over {math.prod(layout.grid)} ranks, and the pieces of {len(known)} "
            f"are here{self._absent(absent)}; fetch all files of this save"
        )

    def _absent(self, ranks: Sequence[int]) -> str:
        """Half a sentence with the names of the missing files of ranks; empty where all are there."""
        names = [with_number(self.names[0], rank) for rank in ranks]
        missing = [name for name in names if name not in self.names]
        return f"; not there: {_listed(missing)}" if missing else ""

    def _refuse_local_shape(self, path: Path, pieces: list[Piece]) -> NoReturn:
        layout = pieces[0].layout
        for piece in pieces:
            runs = runs_of(
                layout.shape,
                layout.grid,
                piece.coordinate,
                layout.placements,
                dict(layout.orders),
                layout.interpretations[0],
            )
            if runs is None:
                self.pieces.unsupported(
                    piece.part.home, path, "cut in an order that its placements do not tell"
                )
            expected = [sum(n for _, n in dim) for dim in runs]
            if tuple(expected) != piece.part.tensor.shape:
                self.pieces.damaged(
                    piece.part.home,
                    path,
                    f"a piece of {list(piece.part.tensor.shape)} where {describe_layout(layout)} puts one of "
                    f"{expected}",
                )
        self.pieces.unsupported(pieces[0].part.home, path, "cut in a way that its pieces' sizes contradict")


def _distinct(boxes: list[list[Box]]) -> Pieces:
    """Where a piece lies to every rank's copy of it; what is empty is nowhere."""
    found: Pieces = {}
    for own in boxes:
        key = tuple((box.start, box.shape) for box in own if 0 not in box.shape)
        if key:
            found.setdefault(key, []).append(own)
    return found


def _with_position(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(first index of the whole, count, first index of the piece) of each run."""
    position = 0
    for first, count in runs:
        yield first, count, position
        position += count


def _numel(found: Pieces) -> int:
    return sum(math.prod(extent) for key in found for _, extent in key)


def _home(piece: Any) -> str:
    home: str = piece.part.home if isinstance(piece, Piece) else piece.home
    return home


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_SHOWN
    return ", ".join(names[:MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
