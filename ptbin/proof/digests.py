"""Digests of a stored file and of the tensors in it.

A file on this machine is cut into groups of neighbouring records, and the groups are hashed side by side on
all cores: SHA-256 of each tensor, CRC-32 of each record, and of what lies between them, of which the file's
is combined. The file's own SHA-256 is the one serial lane; nothing waits for it. A file that is still being
written is hashed as it grows (`GrowingFile`), so the copy and its proof overlap.

Anything else comes as one stream through two lanes: SHA-256 and CRC-32 of the whole file on the calling
thread, those of tensors and records on a second one (hashlib and zlib release the interpreter lock). Views
that are not contiguous are hashed by their logical order.

Costs: a stream is read once, a local file once by each of two lanes, out of the page cache the second time;
tensors that are not contiguous once more. Memory is a chunk for each thread.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ptbin.cores import hashing_pool, hashing_slot
from ptbin.crc32 import combine_crc32
from ptbin.proof.logical import ReadSpan, iter_strided

if TYPE_CHECKING:
    from ptbin.stores import RangeReader

__all__ = ["FileDigests", "GrowingFile", "StoredTensor", "digest_descriptor", "digest_file"]

CHUNK_NBYTES = 4 << 20
BUFFER_NBYTES = 2 << 20
"""What is read of a local file at once: little enough to lie in a core's cache while it is hashed."""
MAX_BUFFERS = 32
SMALL_NBYTES = 1 << 20
GROUP_NBYTES = 16 << 20
PROGRESS_SECONDS = 0.1
FOLLOWED_NBYTES = 128 << 20
"""A group at least this large is hashed while it is still being written, one at a time."""
MAX_COMBINED = 64
"""Records whose CRC-32s are combined to that of their group: a combination takes as long as 100 KB of
CRC-32.
"""


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
    descriptor = reader.fileno() if reader.size > SMALL_NBYTES else None
    if descriptor is not None:
        reader.requests += 1
        reader.bytes_read += reader.size
        return digest_descriptor(descriptor, reader.size, records, tensors, progress, reader.read)
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
            found.tensors[tensor] = _strided_sha256(
                tensor, lambda offset, nbytes: reader.iter_range(offset, nbytes, chunk_nbytes=CHUNK_NBYTES)
            )
    return found


def _strided_sha256(tensor: StoredTensor, read: ReadSpan) -> str:
    assert tensor.stride is not None
    digest = hashlib.sha256()
    pieces = iter_strided(
        read,
        tensor.offset,
        tensor.shape,
        tensor.stride,
        tensor.itemsize,
        tensor.per_unit,
    )
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


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
    """As `digest_file`, of an open file of `size` bytes.

    Args:
        read: called with a range that the file did not give whole; to raise what there is to raise.
    """
    if size > SMALL_NBYTES:
        file = GrowingFile(descriptor, size, records, tensors, read)
        try:
            file.reached(size)
            return file.finish(progress)
        except BaseException:
            file.give_up()
            raise
    distinct = dict.fromkeys(tensors)
    streamed = [tensor for tensor in distinct if tensor.stride is None]
    groups = _groups(size, list(dict.fromkeys(records)), streamed)
    return _digest_small(_LocalFile(descriptor, read, size), size, groups, list(distinct))


class GrowingFile:
    """Digests of an open file of this machine whose first bytes are final while the rest is being written.

    `reached` says how far that is, from the thread that writes; `finish` waits for the digests, `give_up` for
    the threads to let go of the descriptor. One of the two must be called before it is closed.

    Args:
        size: the bytes that the file will have in the end.
        follow: hash from now on, on threads of this file besides the pool's; without, from `finish` on.
        read: called with a range that the file did not give whole; to raise what there is to raise.
    """

    def __init__(
        self,
        descriptor: int,
        size: int,
        records: Iterable[tuple[int, int]],
        tensors: Iterable[StoredTensor],
        read: Callable[[int, int], bytes],
        *,
        follow: bool = False,
    ) -> None:
        distinct = dict.fromkeys(tensors)
        self._size = size
        self._strided = [tensor for tensor in distinct if tensor.stride is not None]
        self._groups = _groups(
            size, list(dict.fromkeys(records)), [tensor for tensor in distinct if tensor.stride is None]
        )
        self._file = _LocalFile(descriptor, read)
        self._found = FileDigests()
        self._crcs: dict[int, int] = {}
        self._begun = 0
        self._pending: list[Future[None]] = []
        self._own = ThreadPoolExecutor(2, thread_name_prefix="ptbin-follow") if follow else None
        self._hashed = 0
        self._whole = self._own.submit(self._hash_whole) if self._own is not None else None
        self._followed: Future[None] | None = None

    def reached(self, position: int) -> None:
        """The first `position` bytes are what they will be."""
        self._file.reached(position)
        ready = []
        while self._begun < len(self._groups):
            group = self._groups[self._begun]
            if group.end <= position:
                ready.append(group)
            elif position > group.start and self._may_follow(group):
                assert self._own is not None
                self._followed = self._own.submit(self._hash, group)
                self._pending.append(self._followed)
            else:
                break
            self._begun += 1
        ready.sort(key=lambda group: group.start - group.end)
        pool = hashing_pool() if ready else None
        for group in ready:
            assert pool is not None
            self._pending.append(pool.submit(self._hash, group))

    def _may_follow(self, group: _Group) -> bool:
        free = self._followed is None or self._followed.done()
        return self._own is not None and free and group.end - group.start >= FOLLOWED_NBYTES

    def finish(self, progress: Callable[[int], None] | None = None) -> FileDigests:
        """The digests, once all of the file has been reached. Raises what reading the file raised."""
        pool = hashing_pool()
        self._pending += [pool.submit(_hash_strided, self._file, t, self._found) for t in self._strided]
        sha256 = self._hash_whole(progress) if self._whole is None else self._followed_whole(progress)
        for task in self._pending:
            task.result()
        if self._own is not None:
            self._own.shutdown()
        found = self._found
        found.sha256 = sha256
        for group in self._groups:
            found.crc32 = combine_crc32(found.crc32, self._crcs[group.start], group.end - group.start)
        return found

    def give_up(self) -> None:
        """Nobody wants the digests any more."""
        self._file.give_up()
        for task in self._pending:
            task.cancel()
        wait(self._pending)
        if self._own is not None:
            self._own.shutdown()

    def _hash(self, group: _Group) -> None:
        _hash_group(self._file, group, self._found, self._crcs)

    def _followed_whole(self, progress: Callable[[int], None] | None) -> str:
        assert self._whole is not None
        told = 0
        while progress is not None and not self._whole.done():
            wait([self._whole], PROGRESS_SECONDS)
            hashed = self._hashed
            progress(hashed - told)
            told = hashed
        if progress is not None:
            progress(self._size - told)
        return self._whole.result()

    def _hash_whole(self, progress: Callable[[int], None] | None = None) -> str:
        whole = hashlib.sha256()
        for chunk in self._file.chunks(0, self._size):
            with hashing_slot():
                whole.update(chunk)
            self._hashed += len(chunk)
            if progress is not None:
                progress(len(chunk))
        return whole.hexdigest()


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
    lane = _RegionLane(own, list(dict.fromkeys([*group.records, *tile])), group.tensors)
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
    found.tensors[tensor] = _strided_sha256(
        tensor, lambda offset, nbytes: (bytes(chunk) for chunk in file.chunks(offset, nbytes))
    )


_buffers: list[bytearray] = []
"""Buffers that no thread uses at the moment. A fresh one costs a page fault for every 4 KiB, for which all
threads of a process queue.
"""


def _buffer(nbytes: int) -> bytearray:
    if nbytes < BUFFER_NBYTES:
        return bytearray(nbytes)
    try:
        return _buffers.pop()
    except IndexError:
        return bytearray(BUFFER_NBYTES)


class _LocalFile:
    """Pieces of an open file, each read into the same buffer: a piece is good until the next one is asked
    for. Asking for one that is not written yet waits for it.
    """

    def __init__(self, descriptor: int, read: Callable[[int, int], bytes], final: int = 0) -> None:
        self._descriptor = descriptor
        self._read = read
        self._final = final
        self._given_up = False
        self._changed = threading.Condition()

    def reached(self, position: int) -> None:
        with self._changed:
            self._final = position
            self._changed.notify_all()

    def give_up(self) -> None:
        """Threads that are still at it stop."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def _wait_for(self, end: int) -> None:
        if self._final < end or self._given_up:
            with self._changed:
                self._changed.wait_for(lambda: self._final >= end or self._given_up)
            if self._given_up:
                raise CancelledError

    def chunks(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        if not nbytes:
            return
        buffer = _buffer(nbytes)
        view = memoryview(buffer)
        end = offset + nbytes
        try:
            while offset < end:
                piece = view[: min(end - offset, len(view))]
                self._wait_for(offset + len(piece))
                got = os.preadv(self._descriptor, [piece], offset)
                if not got:
                    piece = memoryview(self._read(offset, len(piece)))
                    got = len(piece)
                yield piece[:got]
                offset += got
        finally:
            if len(buffer) == BUFFER_NBYTES and len(_buffers) < MAX_BUFFERS:
                _buffers.append(buffer)


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
