"""What container readers are given (`Opening`, `Folder`) and what they make (`Checkpoint`).

Knows no container: a reader that finds a checkpoint inside its file reads it with the function in its
`Opening`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ptbin.errors import CorruptArchiveError, PtbinError, UnsupportedFormatError
from ptbin.options import Limits
from ptbin.reading.containers.source import MemoryReader, SourceFile
from ptbin.reading.pickle.gc_pause import gc_paused
from ptbin.reading.pickle.interpreter import run_pickle
from ptbin.reading.pickle.machine import PickleProgram
from ptbin.reading.pickle.torch_objects import TorchVocabulary
from ptbin.reading.tree import DataSearch
from ptbin.stores.joined import JoinedReader
from ptbin.values.state_dict import Excluded
from ptbin.values.tensors import ByteRange, Deflated, InMemory, Joined, Place, Storage, Tiled, distinct_bytes

if TYPE_CHECKING:
    from ptbin.merging.replicas import Replicas

# Pickles nest torch.save in torch.save when somebody pickles a storage by plain pickle; never deeper.
MAX_NESTING = 4


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint file as read.

    Attributes:
        container: `torch_zip`, `torchscript`, `torch_legacy`, `pickle`, ... (listed in the schema).
        root: the record at the top of the pickle.
        programs: every pickle run, for `verdicts.judge_programs`.
        storages: all storages the pickle refers to, by key.
        archive_root: name of the zip archive's top folder; None outside zip containers.
        script_classes: TorchScript only: class path to its parameter and buffer names.
        metadata: of a safetensors file, its `__metadata__`.
        part: why this is not all of a checkpoint, where the caller takes it all the same (`parts`).
        preferred: path of the candidate to choose where several remain; a container's reader may know.
        other_members: name and size of the other members of an archive that holds checkpoints.
        roles: path to role, where the container itself says what lies there (`reading.roles`).
        excluded: what its reader passed over and knows the role of.
        facts: numbers that it states of the model, by name, for recipes (`n_heads`).
        replicas: copies on other ranks that must be equal, with the storage that the first one went into.
        is_whole: its reader has checked that no part is missing (`parts`).
        search: answers whether a record holds data, and remembers.
        unnamed: records that could hold tensors and that no pickle names: (name, offset, bytes in the file).
    """

    uri: str
    size: int
    container: str
    root: Any
    programs: list[PickleProgram]
    storages: dict[str, Storage]
    vocabulary: TorchVocabulary
    archive_root: str | None = None
    script_classes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    preferred: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    part: str | None = None
    other_members: list[tuple[str, int]] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    excluded: list[Excluded] = field(default_factory=list)
    unnamed: list[tuple[str, int, int]] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=dict)
    replicas: list[tuple[Storage, Replicas]] = field(default_factory=list)
    is_whole: bool = False
    search: DataSearch = field(init=False)

    def __post_init__(self) -> None:
        self.search = DataSearch(self.vocabulary.limits.tree_nodes)

    def move(self, base: int, before: Callable[[Place], Place] = lambda place: place) -> None:
        """Count the offsets of all storages from `base` bytes earlier; `before` changes a place first."""
        for storage in self.storages.values():
            if storage.place is not None:
                storage.place = _move_place(before(storage.place), base)


@dataclass(slots=True)
class Opening:
    """One file being opened, and what its readers share.

    Attributes:
        read: recognises and indexes any file, for checkpoints that lie inside this one.
        depth: how many checkpoints this one lies inside of.
    """

    file: SourceFile
    limits: Limits
    read: ReadFile
    depth: int = 0
    programs: list[PickleProgram] = field(default_factory=list)
    vocabulary: TorchVocabulary = field(init=False)
    _globals: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.vocabulary = TorchVocabulary(self.limits, self._load_nested)

    def another(self, file: SourceFile, *, programs: list[PickleProgram] | None = None) -> Opening:
        """The opening of a file that belongs to this one: one count of tensors and copies for both.

        Args:
            programs: where its pickles go, if not to this one's.
        """
        found = Opening(
            file, self.limits, self.read, self.depth, self.programs if programs is None else programs
        )
        found.vocabulary = self.vocabulary
        return found

    def checkpoint(self) -> Checkpoint:
        """The file, recognised and indexed."""
        return self.read(self)

    def build(self, container: str, root: Any, storages: dict[str, Storage], **more: Any) -> Checkpoint:
        """What a reader found in the file; `more` as the other fields of `Checkpoint`."""
        uri, size = self.file.uri, self.file.size
        return Checkpoint(uri, size, container, root, self.programs, storages, self.vocabulary, **more)

    def run(self, data: bytes, where: str, persistent: Callable[[Any], Any] | None = None) -> PickleProgram:
        """Run the pickle that `data` begins with. Errors as `run_pickle`."""
        return run_pickle(
            data,
            reducers=self.vocabulary.reducers(),
            persistent=persistent,
            set_state=self.vocabulary.set_state,
            limits=self.limits,
            where=where,
        )

    def run_whole(
        self, data: bytes, name: str, where: str, persistent: Callable[[Any], Any] | None = None
    ) -> PickleProgram:
        """Run the pickle that `data` is, called `name`, and keep it for the verdict."""
        program = self.run(data, where, persistent)
        if program.end != len(data):
            program.oddities.append(f"{len(data) - program.end} bytes behind the end of {name}")
        self.programs.append(program)
        return program

    def keep_programs(self, programs: Iterable[PickleProgram]) -> None:
        """Of a part's pickles those that say something to judge which no earlier one said: most are alike."""
        for program in programs:
            program.root = None  # the caller keeps the parts it needs
            if not program.globals.keys() <= self._globals or program.oddities or program.calls:
                self._globals.update(program.globals)
                self.programs.append(program)

    def _load_nested(self, data: bytes) -> Any:
        """The record inside bytes that `torch.storage._load_from_bytes` would hand to `torch.load`."""
        if self.depth >= MAX_NESTING:
            raise CorruptArchiveError(f"{self.file.uri}: torch.save nested more than {MAX_NESTING} deep")
        inner = Opening(
            SourceFile(MemoryReader(data, f"{self.file.uri} (nested)")),
            self.limits,
            self.read,
            self.depth + 1,
            self.programs,
        )
        checkpoint = inner.checkpoint()
        for storage in checkpoint.storages.values():
            if isinstance(storage.place, ByteRange):
                # Nested CRC-32s need no check here: the bytes lie inside a pickle whose own CRC was checked.
                place = storage.place
                storage.place = InMemory(distinct_bytes(data[place.offset : place.offset + place.nbytes]))
            elif isinstance(storage.place, Deflated):
                raise UnsupportedFormatError(f"{self.file.uri}: a compressed archive inside a pickle")
        self.vocabulary.take_over(inner.vocabulary, checkpoint.storages.values())
        return checkpoint.root


@dataclass(frozen=True, slots=True)
class Folder:
    """Several files that are one checkpoint, being opened.

    Attributes:
        read: recognises and indexes any one file.
        recipe: `ConvertOptions.recipe`, for parts that do not say how they make a whole.
        parts: `ConvertOptions.parts`, for files that do not say whether they are all.
    """

    reader: JoinedReader
    limits: Limits
    read: ReadFile
    recipe: str | None = None
    parts: bool = False

    def opening(self, name: str) -> Opening:
        """The one for a file of the folder."""
        return Opening(SourceFile(self.reader.part(name)), self.limits, self.read)

    def build(
        self, container: str, root: Any, opening: Opening, storages: dict[str, Storage], **more: Any
    ) -> Checkpoint:
        """What a reader put together; `opening` holds what its files have in common."""
        uri, size, programs = self.reader.uri, self.reader.size, opening.programs
        return Checkpoint(uri, size, container, root, programs, storages, opening.vocabulary, **more)


ReadFile = Callable[[Opening], Checkpoint]


@contextlib.contextmanager
def as_checkpoint_errors(uri: str) -> Iterator[None]:
    """The outer edge of reading: whatever a foreign file makes Python raise, callers get one error."""
    try:
        with gc_paused():
            yield
    except PtbinError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise CorruptArchiveError(
            f"{uri}: is not internally consistent ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    except struct.error as error:
        raise CorruptArchiveError(f"{uri}: a number in it is out of range ({error})") from error


def read_part(reader: JoinedReader, name: str, opening: Opening) -> Checkpoint:
    """One file of the folder as a checkpoint by itself, its places moved into the whole's address space.

    Its pickles, and the bytes that they carry in themselves, are added to those of `opening`.
    """
    part = reader.part(name)
    checkpoint = opening.another(SourceFile(part)).checkpoint()
    checkpoint.move(part.base)
    return checkpoint


def _move_place(place: Place, base: int) -> Place:
    """The place with its offsets counted from `base` bytes earlier."""
    if isinstance(place, ByteRange):
        return _moved_range(place, base)
    if isinstance(place, Deflated):
        return dataclasses.replace(place, offset=place.offset + base)
    if isinstance(place, InMemory):
        return place
    if isinstance(place, Joined):
        return Joined(tuple(_moved_part(part, base) for part in place.parts))
    tiles = (dataclasses.replace(tile, place=_moved_part(tile.place, base)) for tile in place.tiles)
    return Tiled(place.shape, place.itemsize, tuple(tiles))


def _moved_range(place: ByteRange, base: int) -> ByteRange:
    header = None if place.record_offset is None else place.record_offset + base
    record = None if place.record is None else _moved_range(place.record, base)
    return dataclasses.replace(place, offset=place.offset + base, record_offset=header, record=record)


def _moved_part(place: ByteRange | InMemory, base: int) -> ByteRange | InMemory:
    return place if isinstance(place, InMemory) else _moved_range(place, base)
