"""Digests of a stored file and of the tensors in it, in one sequential pass.

Two lanes over the same bytes: SHA-256 and CRC-32 of the whole file on the calling thread, SHA-256 of
each tensor and CRC-32 of each record on a second one (hashlib and zlib release the interpreter lock).
Views that are not contiguous are hashed afterwards, by their logical order.

Costs: every byte is read once (non-contiguous tensors twice); memory is a few chunks.
"""

from __future__ import annotations

import hashlib
import heapq
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ptbin.proof.logical import iter_strided

if TYPE_CHECKING:
    from ptbin.stores import RangeReader

__all__ = ["FileDigests", "StoredTensor", "digest_file"]

CHUNK_NBYTES = 4 << 20
SMALL_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a stored file: first byte, shape and stride in elements."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    """None where the tensor is contiguous."""
    itemsize: int
    per_unit: int = 1


@dataclass(slots=True)
class FileDigests:
    """SHA-256 as hexadecimal text, CRC-32 as a number."""

    sha256: str = ""
    crc32: int = 0
    records: dict[tuple[int, int], int] = field(default_factory=dict)
    """(offset, nbytes) to CRC-32."""
    tensors: dict[StoredTensor, str] = field(default_factory=dict)


def digest_file(
    reader: RangeReader,
    records: Iterable[tuple[int, int]],
    tensors: Iterable[StoredTensor],
    progress: Callable[[int], None] | None = None,
) -> FileDigests:
    """Hash the file, the records (offset, nbytes) and the tensors in it.

    Raises:
        SourceChangedError, StorageError: from the store.
    """
    found = FileDigests()
    distinct = dict.fromkeys(tensors)
    streamed = [t for t in distinct if t.stride is None]
    lane = _RegionLane(found, list(dict.fromkeys(records)), streamed)
    whole = hashlib.sha256()
    crc = 0
    pool = ThreadPoolExecutor(1) if reader.size > SMALL_NBYTES else None
    try:
        position = 0
        for chunk in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
            beside = pool.submit(lane.take, position, chunk) if pool is not None else None
            whole.update(chunk)
            crc = zlib.crc32(chunk, crc)
            if beside is None:
                lane.take(position, chunk)
            else:
                beside.result()
            position += len(chunk)
            if progress is not None:
                progress(len(chunk))
    finally:
        if pool is not None:
            pool.shutdown()
    lane.finish()
    found.sha256, found.crc32 = whole.hexdigest(), crc
    for tensor in distinct:
        if tensor.stride is not None:
            found.tensors[tensor] = _strided_sha256(tensor, reader)
    return found


def _strided_sha256(tensor: StoredTensor, reader: RangeReader) -> str:
    assert tensor.stride is not None
    digest = hashlib.sha256()
    pieces = iter_strided(
        lambda offset, nbytes: reader.iter_range(offset, nbytes, chunk_nbytes=CHUNK_NBYTES),
        tensor.offset,
        tensor.shape,
        tensor.stride,
        tensor.itemsize,
        tensor.per_unit,
    )
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


class _Region:
    """A range being hashed."""

    __slots__ = ("end", "feed", "finish", "start")

    def __init__(
        self, start: int, nbytes: int, feed: Callable[[memoryview], None], finish: Callable[[], None]
    ) -> None:
        self.start = start
        self.end = start + nbytes
        self.feed = feed
        self.finish = finish


class _RegionLane:
    """Feeds every region, overlapping ones included, from chunks in file order."""

    def __init__(
        self, found: FileDigests, records: list[tuple[int, int]], tensors: list[StoredTensor]
    ) -> None:
        regions = [self._record(found, r) for r in records] + [self._tensor(found, t) for t in tensors]
        self._waiting = sorted(regions, key=lambda r: r.start, reverse=True)
        self._active: list[tuple[int, int, _Region]] = []
        self._serial = 0

    @staticmethod
    def _record(found: FileDigests, record: tuple[int, int]) -> _Region:
        found.records[record] = 0

        def feed(part: memoryview) -> None:
            found.records[record] = zlib.crc32(part, found.records[record])

        return _Region(record[0], record[1], feed, lambda: None)

    @staticmethod
    def _tensor(found: FileDigests, tensor: StoredTensor) -> _Region:
        digest = hashlib.sha256()

        def finish() -> None:
            found.tensors[tensor] = digest.hexdigest()

        return _Region(tensor.offset, tensor.nbytes, digest.update, finish)

    def take(self, position: int, chunk: bytes) -> None:
        end = position + len(chunk)
        view = memoryview(chunk)
        while self._waiting and self._waiting[-1].start < end:
            region = self._waiting.pop()
            self._serial += 1
            heapq.heappush(self._active, (region.end, self._serial, region))
        for _, _, region in self._active:
            first, last = max(region.start - position, 0), min(region.end - position, len(chunk))
            if first < last:
                region.feed(view[first:last])
        while self._active and self._active[0][0] <= end:
            heapq.heappop(self._active)[2].finish()

    def finish(self) -> None:
        """Close what the file ended before; its digest covers what there was."""
        for _, _, region in self._active:
            region.finish()
        for region in self._waiting:
            region.finish()
        self._active, self._waiting = [], []
