"""Opening a checkpoint: which container it is, by content; its index read; its storages placed.

`CONTAINERS` and, for folders, `folders.FOLDER_CONTAINERS` are all there are: a new one is a module and a row
in one of the two. Reads no weights.

Costs: for a remote torch zip the tail, the directory where that is larger than 64 KiB, and the pickle; for a
legacy file the pickles at its beginning; for a folder its index, or the index of each file.
"""

from __future__ import annotations

from collections.abc import Callable

from ptbin.errors import EmptyFileError, NotACheckpointError, UnsupportedFormatError
from ptbin.options import Limits
from ptbin.reading.containers.archives import read_tar_archive
from ptbin.reading.containers.checkpoint import Checkpoint, Folder, Opening
from ptbin.reading.containers.legacy import read_legacy, read_raw_pickle
from ptbin.reading.containers.safetensors import read_safetensors
from ptbin.reading.containers.source import RandomReader, SourceFile
from ptbin.reading.containers.torch_zip import read_zip
from ptbin.reading.containers.unreadable import refuse_compressed, refuse_known_foreign
from ptbin.reading.containers.zip_directory import refuse_prefixed_zip
from ptbin.stores.joined import JoinedReader

__all__ = ["CONTAINERS", "read_checkpoint"]

CONTAINERS: tuple[Callable[[Opening], Checkpoint | None], ...] = (
    # By the head first: any file may hold the bytes of a zip's end record by chance.
    read_zip,
    read_safetensors,
    read_legacy,
    read_tar_archive,
    refuse_compressed,
    refuse_known_foreign,
    read_raw_pickle,
    refuse_prefixed_zip,
)
"""Each answers None for a file that is not its own."""


def read_checkpoint(
    reader: RandomReader, limits: Limits | None = None, recipe: str | None = None, *, parts: bool = False
) -> Checkpoint:
    """Recognise and index one file, or several that are one checkpoint.

    Args:
        recipe: `ConvertOptions.recipe`, for parts that do not say how they make a whole.
        parts: `ConvertOptions.parts`, for files that do not say whether they are all.

    Raises:
        NotACheckpointError: no container of any kind.
        UnsupportedFormatError: one that ptbin recognises and does not read.
        CorruptArchiveError, LimitExceededError: damaged or hostile.
    """
    limits = limits or Limits()
    if not isinstance(reader, JoinedReader):
        return _read_file(Opening(SourceFile(reader), limits, _read_file))
    # Most checkpoints are one file: what reads several, and merges them, is imported for those alone.
    from ptbin.reading.containers.folders import FOLDER_CONTAINERS

    for is_one, read in FOLDER_CONTAINERS:
        if is_one(reader.names):
            return read(Folder(reader, limits, _read_file, recipe, parts))
    raise UnsupportedFormatError(f"{reader.uri}: a folder of no known kind")


def _read_file(opening: Opening) -> Checkpoint:
    """Recognise and index the one file of an opening."""
    file = opening.file
    if file.size == 0:
        raise EmptyFileError(f"{file.uri}: the file is empty")
    for read in CONTAINERS:
        checkpoint = read(opening)
        if checkpoint is not None:
            return checkpoint
    raise NotACheckpointError(f"{file.uri}: begins with {file.head(8)!r}, which no checkpoint container does")
