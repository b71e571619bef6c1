"""Digests of a stored file and of the tensors in it.

A file on this machine is cut into groups of neighbouring records, and the groups are hashed side by side on
all cores, largest first: SHA-256 of each tensor, CRC-32 of each record, and of what lies between them, of
which the file's is combined. The file's own SHA-256 is the one serial lane; it runs on the calling thread,
which afterwards takes groups that no other thread has begun. Where the file was followed while it was written
(`restoring.following`), `digest_regions` leaves that lane out.

Anything else comes as one stream through two lanes: SHA-256 and CRC-32 of the whole file on the calling
thread, those of tensors and records on a second one (hashlib and zlib release the interpreter lock). Views
that are not contiguous are hashed by their logical order.

Costs: a stream is read once, a local file once by each of two lanes, out of the page cache the second time;
tensors that are not contiguous once more. Memory is a chunk for each thread.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ptbin.cores import hashing_pool, hashing_slot
from ptbin.crc32 import combine_crc32
from ptbin.proof.regions import FileDigests, RegionLane, StoredTensor, strided_sha256

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from ptbin.stores import RangeReader

__all__ = ["FileDigests", "StoredTensor", "digest_descriptor", "digest_file", "digest_regions"]

CHUNK_NBYTES = 4 << 20
SMALL_NBYTES = 1 << 20
GROUP_NBYTES = 16 << 20
MAX_COMBINED = 64
"""Records whose CRC-32s are combined to that of their group: a combination takes as long as 100 KB of
CRC-32.
"""


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
    descriptor = reader.fileno() if reader.size > SMALL_NBYTES else None
    if descriptor is not None:
        reader.requests += 1
        reader.bytes_read += reader.size
        return digest_descriptor(descriptor, reader.size, records, tensors, progress, reader.read)
    found = FileDigests()
    distinct = dict.fromkeys(tensors)
    streamed = [t for t in distinct if t.stride is None]
    lane = RegionLane(found, list(dict.fromkeys(records)), streamed)
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
            found.tensors[tensor] = strided_sha256(
                tensor, lambda offset, nbytes: reader.iter_range(offset, nbytes, chunk_nbytes=CHUNK_NBYTES)
            )
    return found


# -- a file of this machine, on all cores ------------------------------------------------------------


@dataclass(slots=True)
class _Group:
    """Neighbouring bytes that one thread hashes: `tile` are the ranges whose CRC-32s make up theirs."""

    start: int
    end: int
    records: list[tuple[int, int]] = field(default_factory=list)
    tensors: list[StoredTensor] = field(default_factory=list)

    @property
    def tile(self) -> list[tuple[int, int]]:
        """Records and the gaps between them, where that is cheaper than a CRC-32 of all bytes besides."""
        whole = [(self.start, self.end - self.start)]
        if len(self.records) > MAX_COMBINED:
            return whole
        ranges = []
        position = self.start
        for offset, nbytes in sorted(self.records):
            if offset < position:
                return whole
            if offset > position:
                ranges.append((position, offset - position))
            ranges.append((offset, nbytes))
            position = offset + nbytes
        return [*ranges, (position, self.end - position)] if position < self.end else ranges


def digest_descriptor(
    descriptor: int,
    size: int,
    records: Iterable[tuple[int, int]],
    tensors: Iterable[StoredTensor],
    progress: Callable[[int], None] | None,
    read: Callable[[int, int], bytes],
) -> FileDigests:
    """As `digest_file`, of an open file of `size` bytes, finished or not.

    Args:
        read: called with a range that the file did not give whole; to raise what there is to raise.
    """
    distinct = list(dict.fromkeys(tensors))
    groups = _groups(size, list(dict.fromkeys(records)), [t for t in distinct if t.stride is None])
    file = _LocalFile(descriptor, read)
    if size <= SMALL_NBYTES:
        return _digest_small(file, size, groups, distinct)
    with _Lanes(file, groups, distinct) as lanes:
        whole = hashlib.sha256()
        for chunk in file.chunks(0, size):
            with hashing_slot():
                whole.update(chunk)
            if progress is not None:
                progress(len(chunk))
        lanes.finish()
    lanes.found.sha256 = whole.hexdigest()
    return lanes.found


def digest_regions(
    descriptor: int,
    size: int,
    records: Iterable[tuple[int, int]],
    tensors: Iterable[StoredTensor],
    read: Callable[[int, int], bytes],
) -> FileDigests:
    """As `digest_descriptor`, without the SHA-256 of the whole file, which is left empty."""
    distinct = list(dict.fromkeys(tensors))
    groups = _groups(size, list(dict.fromkeys(records)), [t for t in distinct if t.stride is None])
    with _Lanes(_LocalFile(descriptor, read), groups, distinct) as lanes:
        lanes.finish()
    return lanes.found


class _Lanes:
    """Groups and tensors that are not contiguous, hashed by the pool and, at the end, the calling thread."""

    def __init__(self, file: _LocalFile, groups: list[_Group], tensors: list[StoredTensor]) -> None:
        self.found = FileDigests()
        self._file = file
        self._groups = groups
        self._crcs: dict[int, int] = {}
        largest_first = sorted(groups, key=lambda group: group.start - group.end)
        work = [
            functools.partial(_hash_group, file, group, self.found, self._crcs) for group in largest_first
        ]
        work += [
            functools.partial(_hash_strided, file, t, self.found) for t in tensors if t.stride is not None
        ]
        self._work = work
        self._pending: list[Future[None]] = []

    def __enter__(self) -> Self:
        pool = hashing_pool()
        self._pending = [pool.submit(task) for task in self._work]
        return self

    def finish(self) -> None:
        """Do what no thread has begun yet, wait for the rest, and put the CRC-32s together."""
        for task, pending in zip(reversed(self._work), reversed(self._pending), strict=True):
            if pending.cancel():
                task()
        for pending in self._pending:
            if not pending.cancelled():
                pending.result()
        for group in self._groups:
            crc = self._crcs[group.start]
            self.found.crc32 = combine_crc32(self.found.crc32, crc, group.end - group.start)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._file.given_up = True
            for pending in self._pending:
                pending.cancel()
            wait(self._pending)


def _digest_small(
    file: _LocalFile, size: int, groups: list[_Group], tensors: list[StoredTensor]
) -> FileDigests:
    """On the calling thread alone: threads would take longer to begin."""
    found = FileDigests()
    crcs: dict[int, int] = {}
    for group in groups:
        _hash_group(file, group, found, crcs)
        found.crc32 = combine_crc32(found.crc32, crcs[group.start], group.end - group.start)
    for tensor in tensors:
        if tensor.stride is not None:
            _hash_strided(file, tensor, found)
    whole = hashlib.sha256()
    for chunk in file.chunks(0, size):
        whole.update(chunk)
    found.sha256 = whole.hexdigest()
    return found


def _groups(size: int, records: list[tuple[int, int]], tensors: list[StoredTensor]) -> list[_Group]:
    """The file cut between regions; a group ends with the first region that makes it large enough."""
    regions: list[tuple[int, int, tuple[int, int] | StoredTensor]] = [(r[0], r[0] + r[1], r) for r in records]
    regions += [(t.offset, t.offset + t.nbytes, t) for t in tensors]
    regions.sort(key=lambda region: region[:2])
    groups = [_Group(0, 0)]
    for start, end, region in regions:
        group = groups[-1]
        if start >= group.end and group.end - group.start >= GROUP_NBYTES:
            group = _Group(group.end, group.end)
            groups.append(group)
        group.end = max(group.end, end)
        if isinstance(region, StoredTensor):
            group.tensors.append(region)
        else:
            group.records.append(region)
    groups[-1].end = max(groups[-1].end, size)
    return groups


def _hash_group(file: _LocalFile, group: _Group, found: FileDigests, crcs: dict[int, int]) -> None:
    own = FileDigests()
    tile = group.tile
    lane = RegionLane(own, list(dict.fromkeys([*group.records, *tile])), group.tensors)
    position = group.start
    for chunk in file.chunks(group.start, group.end - group.start):
        with hashing_slot():
            lane.take(position, chunk)
        position += len(chunk)
    lane.finish()
    crc = 0
    for span in tile:
        crc = combine_crc32(crc, own.records[span], span[1])
    crcs[group.start] = crc
    found.records.update((record, own.records[record]) for record in group.records)
    found.tensors.update(own.tensors)


def _hash_strided(file: _LocalFile, tensor: StoredTensor, found: FileDigests) -> None:
    found.tensors[tensor] = strided_sha256(
        tensor, lambda offset, nbytes: (bytes(chunk) for chunk in file.chunks(offset, nbytes))
    )


class _LocalFile:
    """Pieces of an open file, each read into the same buffer: a piece is good until the next one is asked
    for.
    """

    def __init__(self, descriptor: int, read: Callable[[int, int], bytes]) -> None:
        self._descriptor = descriptor
        self._read = read
        self.given_up = False
        """Whether nobody waits for the digests any more; threads that are still at it stop."""

    def chunks(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        if not nbytes:
            return
        buffer = memoryview(bytearray(min(nbytes, CHUNK_NBYTES)))
        end = offset + nbytes
        while offset < end:
            if self.given_up:
                raise CancelledError
            piece = buffer[: min(end - offset, CHUNK_NBYTES)]
            got = os.preadv(self._descriptor, [piece], offset)
            if not got:
                piece = memoryview(self._read(offset, len(piece)))
                got = len(piece)
            yield piece[:got]
            offset += got
