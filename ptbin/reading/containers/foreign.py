"""Files that are known and not checkpoints: named by how they begin, so that the message says it."""

from __future__ import annotations

from ptbin.errors import NotACheckpointError
from ptbin.reading.containers.checkpoint import Opening

__all__ = ["refuse_known_foreign"]

_FOREIGN = (
    (b"\x89HDF", "an HDF5 file (Keras, maybe)"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy array file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<!DOCTYPE", "an HTML page; was the download refused?"),
    (b"<html", "an HTML page; was the download refused?"),
)


def refuse_known_foreign(opening: Opening) -> None:
    """Name what the file is where its first bytes tell.

    Raises:
        NotACheckpointError: another kind of file.
    """
    head = opening.file.head(512)
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise NotACheckpointError(f"{opening.file.uri}: this is {what}")
