"""Git LFS pointers: the few lines that lie in a file's place where `git lfs pull` has not been run.

Among files that go along with weights one would be copied in place of the tokenizer, and the output would
look whole. One that lies in a checkpoint's place is told by its container (`reading.containers.unreadable`).
"""

from __future__ import annotations

from ptbin.errors import UnsupportedFormatError
from ptbin.stores import Place

__all__ = ["MAX_POINTER_NBYTES", "refuse_pointer", "refuse_pointer_at"]

LFS_POINTER = b"version https://git-lfs"
MAX_POINTER_NBYTES = 1024
"""Git LFS, docs/spec.md: a pointer is shorter than that."""


def refuse_pointer(data: bytes, uri: str) -> None:
    """Raises UnsupportedFormatError where a file's content is a Git LFS pointer and not the file."""
    if len(data) <= MAX_POINTER_NBYTES and data.startswith(LFS_POINTER):
        raise UnsupportedFormatError(
            f"{uri}: a Git LFS pointer, not the file itself; run `git lfs pull` where it comes from"
        )


def refuse_pointer_at(place: Place, nbytes: int) -> None:
    """The same of a file that is still to be read: one read, and only where it is that small.

    Raises:
        UnsupportedFormatError: as `refuse_pointer`. StorageError: from the store.
    """
    if nbytes <= MAX_POINTER_NBYTES:
        refuse_pointer(place.read_bytes(limit=MAX_POINTER_NBYTES), place.uri)
