"""The files of one checkpoint in parts, opened one after the other; what all layouts of parts share.

Owns the counting: one vocabulary and one set of storages for all files, and one row for what each file holds
once more. Knows no layout. Costs: the index of each file; of the records of a file only what a layout keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ptbin.errors import CorruptArchiveError, IncompleteCheckpointError, NotACheckpointError
from ptbin.merging.replicas import Replicas
from ptbin.merging.tiles import Box, Part, whole_tensor
from ptbin.reading.containers.checkpoint import Checkpoint, Folder, Opening
from ptbin.reading.containers.small_tensors import SmallTensors
from ptbin.reading.containers.source import SourceFile
from ptbin.stores.joined import JoinedReader
from ptbin.values.dtypes import BY_NAME, DType
from ptbin.values.nodes import DictNode, Instance
from ptbin.values.state_dict import Excluded
from ptbin.values.tensors import ByteRange, Storage, TensorRef

MAX_PROGRESS_DEPTH = 2
CONSTANT_NBYTES = 4096

Pieces = dict[tuple[Any, ...], list[list[Box]]]
"""Where in the whole a piece lies, as (start, shape) of each of its boxes, to every copy of it."""

# Counters that all parts of one save share (Megatron-LM, DeepSpeed, Lightning, custom trainers).
_PROGRESS = frozenset(
    """
    step steps global_step global_steps global_samples iteration iterations iter epoch epochs num_updates
    current_step train_step trained_steps lr_scheduler_step
    """.split()
)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


def mapping_of(value: Any) -> DictNode | None:
    """A mapping, or the attributes of a record (`argparse.Namespace`)."""
    found = value.attributes() if isinstance(value, Instance) else value
    return found if isinstance(found, DictNode) else None


def _progress_of(root: Any, depth: int = 0) -> dict[str, int | float]:
    """Counters of a file that say when in training it was saved, by dotted name."""
    found: dict[str, int | float] = {}
    for key, value in root.pairs if isinstance(root, DictNode) else ():
        if type(key) is not str:
            continue
        if key in _PROGRESS and type(value) in (int, float):
            found[key] = value
        elif depth < MAX_PROGRESS_DEPTH and isinstance(value, DictNode):
            found.update({f"{key}.{name}": n for name, n in _progress_of(value, depth + 1).items()})
    return found


@dataclass(slots=True)
class PartFiles:
    """Files of one folder being put together.

    Attributes:
        placed_by_name: which part a file is, its name says and nothing in it.
        small: computes what has to be.
        opened: files and their records, for layouts that account for what they leave of each.
    """

    folder: Folder
    placed_by_name: bool = True
    reader: JoinedReader = field(init=False)
    opening: Opening = field(init=False)
    small: SmallTensors = field(init=False)
    opened: list[tuple[str, DictNode]] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    replicas: list[tuple[Storage, Replicas]] = field(default_factory=list)
    left: dict[tuple[str, str | None], list[Any]] = field(default_factory=dict)
    known_storages: dict[object, Storage] = field(default_factory=dict)
    _progress: dict[str, tuple[str, int | float]] = field(default_factory=dict)
    _first: str = ""
    _saved_as: dict[str, str] = field(default_factory=dict)
    _contents: dict[int, str] = field(default_factory=dict)
    _pieces: dict[str, dict[str, int]] = field(default_factory=dict)
    _largest: dict[str, Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reader = self.folder.reader
        self.opening = self.folder.opening(self.reader.names[0])
        self.small = SmallTensors(self.reader)

    @property
    def uri(self) -> str:
        return self.reader.uri

    def open(self, name: str) -> Checkpoint:
        """One file, its storages taken up under the file's name.

        Raises:
            CorruptArchiveError and its kin: the file is damaged; messages have its URI.
            IncompleteCheckpointError: it was saved at another step than the file before.
        """
        part = self.reader.part(name)
        inner = self.opening.another(SourceFile(part), programs=[])
        try:
            checkpoint = inner.checkpoint()
        except NotACheckpointError as error:  # its name says that it is one
            raise CorruptArchiveError(f"{error}; is the copy of {name} complete?") from error
        if self.placed_by_name:
            self._note_name(name, checkpoint)
        checkpoint.move(part.base)
        self.storages.update({f"{name}/{key}": storage for key, storage in checkpoint.storages.items()})
        self.opening.keep_programs(inner.programs)
        self._first = self._first or name
        for what, value in _progress_of(checkpoint.root).items():
            if name == self._first or what in self._progress:
                self.compare_counter(what, name, value)
        return checkpoint

    def _note_name(self, name: str, checkpoint: Checkpoint) -> None:
        """Raise IncompleteCheckpointError: the file is a copy of another one, under its own name.

        torch calls an archive's top folder as the file that it writes (PyTorchFileWriter).
        """
        if (saved := checkpoint.archive_root) is None:
            return
        self._saved_as[name] = saved
        held = [(key, own) for key, own in checkpoint.storages.items() if own.nbytes]
        records = [(key, own.nbytes, getattr(own.place, "crc32", None)) for key, own in held]
        first = self._contents.setdefault(hash((saved, tuple(records))), name)
        if first != name and records and _stem(first) != _stem(name) and saved in (_stem(first), _stem(name)):
            self._refuse_copy(name, first)

    def _refuse_exchanged(self) -> None:
        """Raise IncompleteCheckpointError: files have each other's names."""
        others = {_stem(name): saved for name, saved in self._saved_as.items() if _stem(name) != saved}
        if others and others.keys() == set(others.values()):
            name, saved = next(iter(others.items()))
            self.refuse(f"{name} was saved as {saved}, and other files here have each other's names as well")

    def note_pieces(self, name: str, parts: Iterable[Part], among: str = "ranks") -> None:
        """Note tensors of a name of which each file has its own: two files are not alike in all of them."""
        for part in parts:
            tensor, crc = part.tensor, getattr(part.tensor.storage.place, "crc32", None)
            view = (tensor.storage_offset, tensor.shape, tensor.stride)
            known = part.home if crc is None else (name, crc, tensor.storage.nbytes, view)
            pieces = self._pieces.setdefault(among, {})
            pieces[part.home] = hash((pieces.get(part.home), known))
            largest = self._largest.setdefault(part.home, part)
            if tensor.numel > largest.tensor.numel:
                self._largest[part.home] = part

    def _refuse_twice(self) -> None:
        """Raise IncompleteCheckpointError: two files are alike in all that was noted of them."""
        for pieces in self._pieces.values():
            homes: dict[int, str] = {}
            for home, own in pieces.items():
                first = homes.setdefault(own, home)
                if first != home and not self._is_constant(self._largest[home]):
                    self._refuse_copy(home, first)

    def _refuse_copy(self, name: str, first: str) -> NoReturn:
        self.refuse(
            f"{name} holds the very tensors of {first}, where each has its own: one was copied over the "
            "other; fetch both again"
        )

    def _is_constant(self, part: Part) -> bool:
        """Whether a piece is empty or begins with one value over and over, as what was never trained may."""
        if not part.tensor.numel:
            return True
        size, place = part.tensor.dtype.itemsize, part.tensor.storage.place
        if not isinstance(place, ByteRange):
            return False
        data = self.reader.read(place.offset, min(place.nbytes, CONSTANT_NBYTES) // size * size)
        return data == data[:size] * (len(data) // size)

    def compare_counter(self, what: str, name: str, value: float) -> None:
        """Hold what a file says of the progress of training against the first file that says it.

        Raises:
            IncompleteCheckpointError: they differ.
        """
        first, known = self._progress.setdefault(what, (name, value))
        if value != known:
            self.refuse(
                f"{name} says {what} {value:.15g}, {first} says {known:.15g}: they were saved at different "
                "steps and are not parts of one checkpoint"
            )

    def take_first(self, name: str, copies: Sequence[Part], storage: Storage | None = None) -> TensorRef:
        """The first of copies that must be equal; the others are left out.

        Args:
            storage: what the first one went into, where that is not its own.
        """
        first, *others = copies
        if others:
            self.replicas.append((storage or first.tensor.storage, Replicas(name, tuple(copies))))
            for other in others:
                self.leave_out(other.home, [other.tensor])
        return first.tensor

    def assemble(self, name: str, dtype: DType, shape: tuple[int, ...], pieces: Pieces) -> TensorRef:
        """The tensor that one copy of each piece makes; the other copies must be equal.

        Raises:
            CorruptArchiveError: the pieces overlap or leave gaps.
        """
        boxes = [box for _, (own, *_) in sorted(pieces.items()) for box in own]
        what = f"{self.uri}: the pieces of {name[:200]!r}"
        tensor = whole_tensor(what, name, dtype, shape, boxes, known=self.known_storages)
        for copies in pieces.values():
            self.take_first(name, [own[0].part for own in copies], tensor.storage)
        return tensor

    def leave_out(self, name: str, nodes: Iterable[Any], role: str | None = "replica") -> None:
        """Records of a file that do not go along: one row for each file and role."""
        self.left.setdefault((name, role), []).extend(nodes)

    def leave_out_unopened(self, names: Iterable[str], role: str) -> None:
        """Files that belong to the checkpoint and are not read, counted by their sizes: one row."""
        nodes = []
        for name in names:
            part = self.reader.part(name)
            storage = Storage(name, part.size, ByteRange(part.base, part.size))
            nodes.append(TensorRef(storage, BY_NAME["uint8"], (part.size,), (1,)))
        if nodes:
            first = nodes[0].storage.key
            more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
            self.leave_out(f"{first}{more} (not opened)", nodes, role)

    def refuse_unlike(self, name: str, one: Part, other: Part) -> NoReturn:
        """Raise IncompleteCheckpointError: two parts of a name do not go together."""
        self.refuse(
            f"{name[:200]!r} is {one.form} in {one.home} and {other.form} in {other.home}: the files are not "
            "of one save"
        )

    def refuse_missing(self, name: str, of: str = "") -> NoReturn:
        """Raise IncompleteCheckpointError: a file is not there."""
        self.refuse(f"{name} is missing{of}; fetch the folder again, whole")

    def refuse(self, why: str) -> NoReturn:
        """Raise IncompleteCheckpointError."""
        raise IncompleteCheckpointError(f"{self.uri}: {why}")

    def checkpoint(
        self,
        container: str,
        root: Any,
        *,
        preferred: str | None = None,
        roles: Mapping[str, str] | None = None,
        facts: Mapping[str, int] | None = None,
    ) -> Checkpoint:
        """The whole.

        Raises:
            IncompleteCheckpointError: one file is there twice, as two parts, or two have each other's names.
        """
        self._refuse_exchanged()
        self._refuse_twice()
        return self.folder.build(
            container,
            root,
            self.opening,
            self.storages,
            preferred=preferred,
            roles=dict(roles or {}),
            excluded=[Excluded(name, role, node=nodes) for (name, role), nodes in self.left.items()],
            replicas=self.replicas,
            facts=dict(facts or {}),
            is_whole=True,
        )


class Tree:
    """Nested mappings, in which whole tensors take the places of pieces."""

    def __init__(self, root: DictNode) -> None:
        self._root = root
        self._places: dict[int, dict[Any, int]] = {}

    def put(self, path: tuple[Any, ...], value: TensorRef) -> None:
        """Put a tensor into its place, creating the mappings above it that are missing."""
        node = self._root
        for step in path[:-1]:
            places = self._index(node)
            below = node.pairs[places[step]][1] if step in places else None
            if not isinstance(below, DictNode):
                below = DictNode(self._root.kind)
                self._set(node, step, below)
            node = below
        self._set(node, path[-1], value)

    def _index(self, node: DictNode) -> dict[Any, int]:
        found = self._places.get(id(node))
        if found is None:
            found = {key: at for at, (key, _) in enumerate(node.pairs) if type(key) in (str, int)}
            self._places[id(node)] = found
        return found

    def _set(self, node: DictNode, key: Any, value: Any) -> None:
        places = self._index(node)
        at = places.setdefault(key, len(node.pairs))
        node.pairs[at : at + 1] = [(key, value)]
