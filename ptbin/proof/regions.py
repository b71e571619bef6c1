"""What is hashed of a file: regions that may overlap, fed from chunks in the order of the file.

Knows neither files nor threads. Memory is what the regions under way need.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable

from ptbin.proof.logical import ReadSpan, iter_strided
from ptbin.values.crc32 import crc32_of
from ptbin.values.digests import FileDigests, StoredTensor


def strided_sha256(tensor: StoredTensor, read: ReadSpan) -> str:
    """Of a tensor that is stored with strides, over its elements in logical order."""
    assert tensor.stride is not None
    digest = hashlib.sha256()
    pieces = iter_strided(read, tensor.offset, tensor.shape, tensor.stride, tensor.itemsize, tensor.per_unit)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def sha256_of_tensor(tensor: StoredTensor, read: ReadSpan) -> str:
    """Of one tensor, by its logical order; for one that no pass over the file has hashed."""
    if tensor.stride is not None:
        return strided_sha256(tensor, read)
    digest = hashlib.sha256()
    for piece in read(tensor.offset, tensor.nbytes):
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


class RegionLane:
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
            found.records[record] = crc32_of(part, found.records[record])

        return _Region(record[0], record[1], feed, lambda: None)

    @staticmethod
    def _tensor(found: FileDigests, tensor: StoredTensor) -> _Region:
        digest = hashlib.sha256()

        def finish() -> None:
            found.tensors[tensor] = digest.hexdigest()

        return _Region(tensor.offset, tensor.nbytes, digest.update, finish)

    def take(self, position: int, chunk: bytes | memoryview) -> None:
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
