"""CRC-32s of records of the source that do not go into the output in one piece.

Ranks, views and recipes cut a record into several tensors, or take its elements in another order. The bytes
of such a record are counted as they are read, in any order; once all have passed, their CRC-32s are combined
and must give the one that the container states. Each byte is counted once. What no tensor takes (padding,
say) is read at the end where that costs little: up to 512 KiB or 1 % of the weights.

Memory: a few numbers for each run of a record that has been read so far.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from ptbin.stores import RangeReader
from ptbin.values.crc32 import combine_crc32, confirm_crc32, crc32_of, crc32_of_all
from ptbin.values.segments import Plan
from ptbin.values.tensors import ByteRange

SPARE_NBYTES = 512 * 1024
SPARE_SHARE = 100
MAX_RUNS = 1 << 16
"""Runs of one record that are remembered; what else is read of it then does not count."""


class RecordChecks:
    """The records that the files of one output take in part. Several threads may use it.

    Attributes:
        confirmed: those that are what their container states, so far; the last file that takes from a record
            settles it.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.confirmed: set[ByteRange] = set()
        self._files_left = Counter(record for plan in plans for record in _taken_in_part(plan))
        self._by_offset = {record.offset: record for record in self._files_left}
        self._offsets = sorted(self._by_offset)
        self._passed: dict[ByteRange, _Passed] = {}
        """Of records that are under way."""
        self._spare = max(SPARE_NBYTES, sum(r.nbytes for p in plans for r in p.records) // SPARE_SHARE)
        self._lock = threading.Lock()

    @property
    def counts(self) -> bool:
        """Whether there are any."""
        return bool(self._offsets)

    def watch(self, reader: RangeReader) -> RangeReader:
        """A reader of the same source that counts what it reads."""
        return _WatchedReader(reader, self) if self.counts else reader

    def count(self, uri: str, offset: int, data: bytes) -> None:
        """Count bytes that were read. Raises ChecksumMismatchError: of a record that is not as stated."""
        if (passed := self._at(offset)) is not None:
            with passed.lock:
                passed.add(offset, memoryview(data))
                self._confirm(uri, passed)

    def count_run(self, uri: str, offset: int, nbytes: int, crc32: int) -> None:
        """As `count`, of bytes that went by and whose CRC-32 is known."""
        if (passed := self._at(offset)) is not None:
            with passed.lock:
                passed.add_run(offset, nbytes, crc32)
                self._confirm(uri, passed)

    def settle(self, plan: Plan, reader: RangeReader) -> None:
        """After a file: read what is missing of records that no file after it takes from.

        Raises:
            ChecksumMismatchError: a record is not what its container states.
        """
        with self._lock:
            mine = _taken_in_part(plan) & self._files_left.keys()
            self._files_left.subtract(mine)
            last = [record for record in mine - self.confirmed if self._files_left[record] <= 0]
            under_way = [self._passed.get(record) or _Passed(record) for record in last]
            for passed in sorted(under_way, key=lambda passed: passed.missing_nbytes):
                if passed.missing_nbytes > self._spare:
                    break
                self._spare -= passed.missing_nbytes
                for offset, nbytes in list(passed.missing()):
                    passed.add_run(offset, nbytes, crc32_of_all(reader.iter_range(offset, nbytes)))
                self._confirm(reader.uri, passed)

    def _at(self, offset: int) -> _Passed | None:
        index = bisect.bisect_right(self._offsets, offset) - 1
        record = self._by_offset[self._offsets[index]] if index >= 0 else None
        if record is None or offset >= record.offset + record.nbytes or record in self.confirmed:
            return None
        return self._passed.get(record) or self._passed.setdefault(record, _Passed(record))

    def _confirm(self, uri: str, passed: _Passed) -> None:
        if not passed.missing_nbytes and passed.record not in self.confirmed:
            confirm_crc32(uri, passed.record.member, passed.crc32(), passed.record.crc32)
            self.confirmed.add(passed.record)
            self._passed.pop(passed.record, None)


def _taken_in_part(plan: Plan) -> set[ByteRange]:
    return {record for layout in plan.records for record in layout.taken_in_part}


class _Passed:
    """What has passed of a record: runs that do not overlap, in order."""

    def __init__(self, record: ByteRange) -> None:
        self.record = record
        self.missing_nbytes = record.nbytes
        self.lock = threading.Lock()
        self._starts: list[int] = []
        self._runs: list[tuple[int, int]] = []  # (end, CRC-32)

    def crc32(self) -> int:
        """Of all runs, one behind the other."""
        total = 0
        for start, (end, crc) in zip(self._starts, self._runs, strict=True):
            total = combine_crc32(total, crc, end - start)
        return total

    def missing(self, first: int | None = None, end: int | None = None) -> Iterator[tuple[int, int]]:
        """(offset, nbytes) of what has not passed: of all the record, or of a range that begins in it."""
        at = self.record.offset if first is None else first
        stop = self.record.offset + self.record.nbytes
        stop = stop if end is None else min(stop, end)
        index = max(bisect.bisect_right(self._starts, at) - 1, 0)
        while at < stop:
            start = min(self._starts[index], stop) if index < len(self._starts) else stop
            if at < start:
                yield at, start - at
            at = max(at, self._runs[index][0]) if start < stop else stop
            index += 1

    def add(self, offset: int, data: memoryview) -> None:
        """Count what of these bytes has not passed yet."""
        for start, nbytes in list(self.missing(offset, offset + len(data))):
            self._put(start, nbytes, crc32_of(data[start - offset : start - offset + nbytes]))

    def add_run(self, offset: int, nbytes: int, crc32: int) -> None:
        """Count a run, unless some of it has passed: the CRC-32 is one of all of it."""
        if list(self.missing(offset, offset + nbytes)) == [(offset, nbytes)]:
            self._put(offset, nbytes, crc32)

    def _put(self, offset: int, nbytes: int, crc32: int) -> None:
        index = bisect.bisect_right(self._starts, offset)
        end, before = self._runs[index - 1] if index else (-1, 0)
        if end == offset:
            self._runs[index - 1] = (offset + nbytes, combine_crc32(before, crc32, nbytes))
        elif len(self._runs) < MAX_RUNS:
            self._starts.insert(index, offset)
            self._runs.insert(index, (offset + nbytes, crc32))
        else:
            return
        self.missing_nbytes -= nbytes


class _WatchedReader(RangeReader):
    """Reads what another one reads, and counts it."""

    def __init__(self, inner: RangeReader, checks: RecordChecks) -> None:
        super().__init__(inner.uri, inner.size, inner.identity)
        self._inner = inner
        self._checks = checks

    def read(self, offset: int, nbytes: int) -> bytes:
        data = self._inner.read(offset, nbytes)
        self._checks.count(self.uri, offset, data)
        return data

    def iter_range(self, offset: int, nbytes: int, *, chunk_nbytes: int | None = None) -> Iterator[bytes]:
        for piece in self._inner.iter_range(offset, nbytes, chunk_nbytes=chunk_nbytes):
            self._checks.count(self.uri, offset, piece)
            offset += len(piece)
            yield piece

    def check_unchanged(self) -> None:
        self._inner.check_unchanged()
