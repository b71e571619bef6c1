"""The files of one checkpoint in parts, opened one after the other; what all layouts of parts share.

Owns the counting: one vocabulary and one set of storages for all files, and one row for what each file holds
once more. Knows no layout. Costs: the index of each file; of the records of a file only what a layout keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ptbin.errors import CorruptArchiveError, IncompleteCheckpointError, NotACheckpointError
from ptbin.merging.replicas import Replicas
from ptbin.merging.tiles import Part
from ptbin.reading.containers.checkpoint import Checkpoint, Folder, Opening, move_place
from ptbin.reading.containers.small_tensors import SmallTensors
from ptbin.reading.containers.source import SourceFile
from ptbin.stores.joined import JoinedReader
from ptbin.values.dtypes import BY_NAME
from ptbin.values.nodes import DictNode, Instance
from ptbin.values.state_dict import Excluded
from ptbin.values.tensors import ByteRange, Storage, TensorRef

__all__ = ["PartFiles", "mapping_of", "progress_of"]

MAX_PROGRESS_DEPTH = 2

# Counters that all parts of one save share (Megatron-LM, DeepSpeed, Lightning, trainers of people's own).
_PROGRESS = frozenset(
    """
    step steps global_step global_steps global_samples iteration iterations iter epoch epochs num_updates
    current_step train_step trained_steps lr_scheduler_step
    """.split()
)


def mapping_of(value: Any) -> DictNode | None:
    """A mapping, or the attributes of a record (`argparse.Namespace`)."""
    found = value.attributes() if isinstance(value, Instance) else value
    return found if isinstance(found, DictNode) else None


def progress_of(root: Any, depth: int = 0) -> dict[str, int | float]:
    """Counters of a file that say when in training it was saved, by dotted name."""
    found: dict[str, int | float] = {}
    for key, value in root.pairs if isinstance(root, DictNode) else ():
        if type(key) is not str:
            continue
        if key in _PROGRESS and type(value) in (int, float):
            found[key] = value
        elif depth < MAX_PROGRESS_DEPTH and isinstance(value, DictNode):
            found.update({f"{key}.{name}": n for name, n in progress_of(value, depth + 1).items()})
    return found


@dataclass(slots=True)
class PartFiles:
    """Files of one folder being put together.

    Attributes:
        small: computes what has to be.
        opened: files and their records, for layouts that account for what they leave of each.
    """

    folder: Folder
    reader: JoinedReader = field(init=False)
    opening: Opening = field(init=False)
    small: SmallTensors = field(init=False)
    opened: list[tuple[str, DictNode]] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    replicas: list[tuple[Storage, Replicas]] = field(default_factory=list)
    left: dict[tuple[str, str | None], list[Any]] = field(default_factory=dict)
    made: dict[object, Storage] = field(default_factory=dict)
    _globals: set[tuple[str, str]] = field(default_factory=set)
    _progress: tuple[str, dict[str, int | float]] | None = None

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
        for key, storage in checkpoint.storages.items():
            assert storage.place is not None
            storage.place = move_place(storage.place, part.base)
            self.storages[f"{name}/{key}"] = storage
        for program in inner.programs:
            program.root = None  # the caller keeps of it what it needs
            # Those that say something to judge which no earlier one said: many files are alike.
            if not program.globals.keys() <= self._globals or program.oddities or program.calls:
                self._globals.update(program.globals)
                self.opening.programs.append(program)
        self._compare_progress(name, checkpoint.root)
        return checkpoint

    def _compare_progress(self, name: str, root: Any) -> None:
        found = progress_of(root)
        if self._progress is None:
            self._progress = (name, found)
            return
        first, known = self._progress
        for key, value in found.items():
            if known.get(key, value) != value:
                raise IncompleteCheckpointError(
                    f"{self.uri}: {name} says {key} {value}, {first} says {known[key]}: they were saved at "
                    "different steps and are no parts of one checkpoint"
                )

    def equal(self, name: str, taken: Storage, parts: Iterable[Part]) -> None:
        """Note that the parts, of which the first is in `taken`, must be equal."""
        found = tuple(parts)
        if len(found) > 1:
            self.replicas.append((taken, Replicas(name, found)))

    def leave(self, name: str, nodes: Iterable[Any], role: str | None = "replica") -> None:
        """Records of a file that do not go along: one row for each file and role."""
        self.left.setdefault((name, role), []).extend(nodes)

    def leave_unopened(self, names: Iterable[str], role: str) -> None:
        """Files that belong to the checkpoint and are not read, counted by their sizes: one row."""
        nodes = []
        for name in names:
            part = self.reader.part(name)
            storage = Storage(name, part.size, ByteRange(part.base, part.size))
            nodes.append(TensorRef(storage, BY_NAME["uint8"], (part.size,), (1,)))
        if nodes:
            first = nodes[0].storage.key
            more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
            self.leave(f"{first}{more} (not opened)", nodes, role)

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
    ) -> Checkpoint:
        """The whole."""
        found = Checkpoint(
            self.uri,
            self.reader.size,
            container,
            root,
            self.opening.programs,
            self.storages,
            self.opening.vocabulary,
            preferred=preferred,
            roles=dict(roles or {}),
            excluded=[Excluded(name, role, node=nodes) for (name, role), nodes in self.left.items()],
        )
        found.replicas = self.replicas
        return found
