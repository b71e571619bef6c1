"""The one SHA-256 of a file that cannot be cut among threads: of all its bytes, or of those in no tensor.

With the tensors' own digests the latter proves as much, and costs next to nothing: what lies between tensors
is an index and some padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

from ptbin.values.digests import FileDigests, StoredTensor

Serial = Literal["file", "gaps", "nothing"]
"""What it covers."""


def serial_of(file_digest: str) -> Serial:
    """What it covers for the digest of a file of weights that `ConvertOptions.file_digest` asks for."""
    return "file" if file_digest == "sha256" else "gaps"


class SerialLane:
    """Hashes chunks that come in the order of the file; of others than `ranges` it takes nothing."""

    def __init__(self, covers: Serial, size: int, tensors: Iterable[StoredTensor]) -> None:
        self._covers = covers
        self.ranges: list[tuple[int, int]] = []
        """(offset, nbytes), ascending."""
        if covers != "nothing":
            self.ranges = _gaps_between(size, tensors) if covers == "gaps" else [(0, size)]
        self._next = 0
        self._digest = hashlib.sha256()

    def take(self, position: int, chunk: bytes | memoryview) -> None:
        end = position + len(chunk)
        view = memoryview(chunk)
        while self._next < len(self.ranges):
            start, nbytes = self.ranges[self._next]
            if start >= end:
                return
            self._digest.update(view[max(start - position, 0) : start + nbytes - position])
            if start + nbytes > end:
                return
            self._next += 1

    def finish(self, found: FileDigests) -> None:
        """State the digest."""
        if self._covers == "file":
            found.sha256 = self._digest.hexdigest()
        elif self._covers == "gaps":
            found.gaps_sha256 = self._digest.hexdigest()


def _gaps_between(size: int, tensors: Iterable[StoredTensor]) -> list[tuple[int, int]]:
    """(offset, nbytes) of what lies in no tensor that is stored contiguously, in the order of the file."""
    gaps = []
    position = 0
    for start, end in sorted((t.offset, t.offset + t.nbytes) for t in tensors if t.stride is None):
        if start > position:
            gaps.append((position, start - position))
        position = max(position, end)
    if position < size:
        gaps.append((position, size - position))
    return gaps
