"""What is hashed of a file: regions that may overlap, fed from chunks in the order of the file.

Knows neither files nor threads. Memory is what the regions under way need.
"""

from __future__ import annotations

import hashlib
import heapq

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


_Region = tuple[int, int, tuple[int, int] | StoredTensor]
"""First byte, end, and what lies there: a record (offset, nbytes) or a tensor."""


class _Running:
    """A region of which bytes are still to come."""

    __slots__ = ("crc", "end", "found", "sha256", "start", "what")

    def __init__(self, found: FileDigests, region: _Region) -> None:
        self.found = found
        self.start, self.end, self.what = region
        self.crc = 0
        self.sha256 = hashlib.sha256() if isinstance(self.what, StoredTensor) else None

    def feed(self, part: memoryview) -> None:
        if self.sha256 is not None:
            self.sha256.update(part)
        else:
            self.crc = crc32_of(part, self.crc)

    def finish(self) -> None:
        if isinstance(self.what, StoredTensor):
            assert self.sha256 is not None
            self.found.tensors[self.what] = self.sha256.hexdigest()
        else:
            self.found.records[self.what] = self.crc


class RegionLane:
    """Feeds every region, overlapping ones included, from chunks in file order.

    A region that lies in one chunk from end to end, as small ones do, is hashed in one call.
    """

    def __init__(
        self, found: FileDigests, records: list[tuple[int, int]], tensors: list[StoredTensor]
    ) -> None:
        self._found = found
        regions: list[_Region] = [(r[0], r[0] + r[1], r) for r in records]
        regions += [(t.offset, t.offset + t.nbytes, t) for t in tensors]
        regions.sort(key=_begin, reverse=True)
        self._waiting = regions
        self._active: list[tuple[int, int, _Running]] = []
        self._serial = 0

    def take(self, position: int, chunk: bytes | memoryview) -> None:
        end = position + len(chunk)
        view = memoryview(chunk)
        found, waiting = self._found, self._waiting
        while waiting and waiting[-1][0] < end:
            region = waiting.pop()
            start, region_end, what = region
            if start >= position and region_end <= end:
                part = view[start - position : region_end - position]
                if type(what) is StoredTensor:
                    found.tensors[what] = hashlib.sha256(part).hexdigest()
                else:
                    found.records[what] = crc32_of(part)  # type: ignore[index]
                continue
            self._serial += 1
            heapq.heappush(self._active, (region_end, self._serial, _Running(found, region)))
        for _, _, running in self._active:
            first, last = max(running.start - position, 0), min(running.end - position, len(chunk))
            if first < last:
                running.feed(view[first:last])
        while self._active and self._active[0][0] <= end:
            heapq.heappop(self._active)[2].finish()

    def finish(self) -> None:
        """Close what the file ended before; its digest covers what there was."""
        for _, _, running in self._active:
            running.finish()
        for region in self._waiting:
            _Running(self._found, region).finish()
        self._active, self._waiting = [], []


def _begin(region: _Region) -> int:
    return region[0]
