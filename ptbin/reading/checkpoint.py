"""One checkpoint file, opened: container recognised by content, pickle run symbolically, storages placed.

Owns the decision which container a file is and the value every later step works on. It does not
choose a state dict (`selection`), does not judge (`verdicts` does, from the programs kept here) and
reads none of the weights.

Costs: for a remote torch zip the tail, the directory where that is larger than 64 KiB, and the pickle;
for a legacy file the pickles at its beginning.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ptbin.errors import (
    CorruptArchiveError,
    EmptyFileError,
    NotACheckpointError,
    PtbinError,
    UnsupportedFormatError,
)
from ptbin.merging.replicas import Replicas
from ptbin.options import Limits
from ptbin.reading.collector import collector_paused
from ptbin.reading.pickle_machine import PickleProgram
from ptbin.reading.source import RandomReader, SourceFile
from ptbin.reading.torch_objects import TorchVocabulary
from ptbin.reading.tree import DataSearch
from ptbin.state_dict import Excluded
from ptbin.stores.joined import JoinedReader
from ptbin.tensors import ByteRange, Deflated, InMemory, Storage, own_bytes

__all__ = ["Checkpoint", "MemoryReader", "Opening", "one_clear_error", "read_checkpoint", "read_opened"]

# Pickles nest torch.save in torch.save when somebody pickles a storage by plain pickle; never deeper.
MAX_NESTING = 4

_FOREIGN = (
    (b"\x89HDF", "an HDF5 file (Keras, maybe)"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy array file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<!DOCTYPE", "an HTML page; was the download refused?"),
    (b"<html", "an HTML page; was the download refused?"),
)


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
        other_members: name and size of what lies beside the checkpoints of an archive and is none itself.
        roles: path to role, where the container itself says what lies there (`reading.roles`).
        excluded: what its reader passed over and knows the role of.
        facts: numbers that it states of the model, by name, for recipes (`n_heads`).
        replicas: copies on other ranks that must be equal, with the storage that the first one went into.
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
    search: DataSearch = field(init=False)

    def __post_init__(self) -> None:
        self.search = DataSearch(self.vocabulary.limits)


@dataclass(slots=True)
class Opening:
    """What the container readers share while one file is opened."""

    file: SourceFile
    limits: Limits
    depth: int = 0
    programs: list[PickleProgram] = field(default_factory=list)
    vocabulary: TorchVocabulary = field(init=False)

    def __post_init__(self) -> None:
        self.vocabulary = TorchVocabulary(self.limits, self._load_nested)

    def _load_nested(self, data: bytes) -> Any:
        """The record inside bytes that `torch.storage._load_from_bytes` would hand to `torch.load`."""
        if self.depth >= MAX_NESTING:
            raise CorruptArchiveError(f"{self.file.uri}: torch.save nested more than {MAX_NESTING} deep")
        inner = Opening(
            SourceFile(MemoryReader(data, f"{self.file.uri} (nested)")),
            self.limits,
            self.depth + 1,
            self.programs,
        )
        checkpoint = read_opened(inner)
        for storage in checkpoint.storages.values():
            if isinstance(storage.place, ByteRange):
                # Nested CRC-32s need no check here: the bytes lie inside a pickle whose own CRC was checked.
                place = storage.place
                storage.place = InMemory(own_bytes(data[place.offset : place.offset + place.nbytes]))
            elif isinstance(storage.place, Deflated):
                raise UnsupportedFormatError(f"{self.file.uri}: a compressed archive inside a pickle")
        self.vocabulary.take_over(inner.vocabulary, checkpoint.storages.values())
        return checkpoint.root


@contextlib.contextmanager
def one_clear_error(uri: str) -> Iterator[None]:
    """The outer edge of reading: whatever a foreign file brings Python to, callers see one kind of error."""
    try:
        with collector_paused():
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
            f"{uri}: what it says makes no sense ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    except struct.error as error:
        raise CorruptArchiveError(f"{uri}: a number in it is out of range ({error})") from error


class MemoryReader:
    """Bytes in memory, as a `RandomReader`."""

    def __init__(self, data: bytes, uri: str) -> None:
        self._data = data
        self.size = len(data)
        self.uri = uri

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._data[offset : offset + nbytes]


def read_checkpoint(
    reader: RandomReader, limits: Limits | None = None, recipe: str | None = None
) -> Checkpoint:
    """Recognise and index one file, or several that are one checkpoint.

    Args:
        recipe: `ConvertOptions.recipe`, for parts that do not say how they make a whole.

    Raises:
        NotACheckpointError: no container of any kind.
        UnsupportedFormatError: one that ptbin recognises and does not read.
        CorruptArchiveError, LimitExceededError: damaged or hostile.
    """
    limits = limits or Limits()
    if isinstance(reader, JoinedReader):
        from ptbin.reading.folders import read_folder

        return read_folder(reader, limits, recipe)
    return read_opened(Opening(SourceFile(reader), limits))


def read_opened(opening: Opening) -> Checkpoint:
    """Recognise and index the one file of an opening."""
    # Here, because the container readers need `Checkpoint` and `Opening`.
    from ptbin.reading.archives import read_tar_archive
    from ptbin.reading.compressed import refuse_compressed
    from ptbin.reading.legacy import read_legacy, read_raw_pickle
    from ptbin.reading.safetensors import read_safetensors
    from ptbin.reading.torch_zip import read_torch_zip
    from ptbin.reading.zip_directory import read_zip_directory, refuse_prefixed_zip

    file = opening.file
    if file.size == 0:
        raise EmptyFileError(f"{file.uri}: the file is empty")
    # By the head first: any file may hold the bytes of a zip's end record by chance.
    head = file.head(512)
    if head[:4] == b"PK\x03\x04":
        return read_torch_zip(opening, read_zip_directory(file, opening.limits))
    readers: tuple[Callable[[Opening], Checkpoint | None], ...] = (
        read_safetensors,
        read_legacy,
        read_tar_archive,
        refuse_compressed,
        refuse_known_foreign,
        read_raw_pickle,
    )
    for read in readers:
        checkpoint = read(opening)
        if checkpoint is not None:
            return checkpoint
    refuse_prefixed_zip(file, opening.limits)
    raise NotACheckpointError(f"{file.uri}: begins with {head[:8]!r}, which no checkpoint container does")


def refuse_known_foreign(opening: Opening) -> None:
    """Name what the file is where its first bytes tell.

    Raises:
        NotACheckpointError: another kind of file.
    """
    head = opening.file.head(512)
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise NotACheckpointError(f"{opening.file.uri}: this is {what}")
