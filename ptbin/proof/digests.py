"""Digests of a stored file and of the tensors in it.

A file on this machine is cut into groups of neighbouring records, and the groups are hashed side by side on
all cores: SHA-256 of each tensor, CRC-32 of each record, and of what lies between them, of which the file's
is combined. The file's own SHA-256 is the one serial lane; its thread then takes groups that no other one has
begun. A file that is still being written is hashed as it grows (`GrowingFile`), so the copy and its proof
overlap.

Anything else comes as one stream through two lanes: SHA-256 and CRC-32 of the whole file on the calling
thread, those of tensors and records on a second one (hashlib and zlib release the interpreter lock). Views
that are not contiguous are hashed by their logical order.

Costs: a stream is read once, a local file once by each of two lanes, out of the page cache the second time;
tensors that are not contiguous once more. Memory is a chunk for each thread.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ptbin.cores import hashing_pool, hashing_slot
from ptbin.proof.local_file import LocalFile
from ptbin.proof.regions import RegionLane, strided_sha256
from ptbin.values.crc32 import combine_crc32
from ptbin.values.digests import FileDigests, StoredTensor

if TYPE_CHECKING:
    from ptbin.stores import RangeReader

__all__ = [
    "FileDigests",
    "GrowingFile",
    "StoredTensor",
    "digest_descriptor",
    "digest_file",
    "digest_regions",
]

CHUNK_NBYTES = 4 << 20
SMALL_NBYTES = 1 << 20
GROUP_NBYTES = 16 << 20
PROGRESS_SECONDS = 0.1
FOLLOWED_NBYTES = 128 << 20
"""A group at least this large is hashed while it is still being written, one at a time."""
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
    return _digest_small(LocalFile(descriptor, read, size), size, groups, list(distinct))


def digest_regions(
    descriptor: int,
    size: int,
    records: Iterable[tuple[int, int]],
    tensors: Iterable[StoredTensor],
    read: Callable[[int, int], bytes],
) -> FileDigests:
    """As `digest_descriptor`, without the SHA-256 of the whole file, which is left empty."""
    file = GrowingFile(descriptor, size, records, tensors, read)
    try:
        file.reached(size)
        return file.finish(whole=False)
    except BaseException:
        file.give_up()
        raise


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
        self._file = LocalFile(descriptor, read)
        self._found = FileDigests()
        self._crcs: dict[int, int] = {}
        self._begun = 0
        self._pending: list[Future[None]] = []
        self._waiting: list[tuple[Future[None], Callable[[], None]]] = []
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
        for group in ready:
            self._submit(functools.partial(self._hash, group))

    def _may_follow(self, group: _Group) -> bool:
        free = self._followed is None or self._followed.done()
        return self._own is not None and free and group.end - group.start >= FOLLOWED_NBYTES

    def finish(self, progress: Callable[[int], None] | None = None, *, whole: bool = True) -> FileDigests:
        """The digests, once all of the file has been reached. Raises what reading the file raised."""
        for tensor in self._strided:
            self._submit(functools.partial(_hash_strided, self._file, tensor, self._found))
        sha256 = ""
        if whole:
            sha256 = self._hash_whole(progress) if self._whole is None else self._followed_whole(progress)
        for pending, task in reversed(self._waiting):
            if pending.cancel():
                task()  # no other thread has begun it
        for pending in self._pending:
            if not pending.cancelled():
                pending.result()
        if self._own is not None:
            self._own.shutdown()
        found = self._found
        found.sha256 = sha256
        for group in self._groups:
            found.crc32 = combine_crc32(found.crc32, self._crcs[group.start], group.end - group.start)
        return found

    def _submit(self, task: Callable[[], None]) -> None:
        pending = hashing_pool().submit(task)
        self._pending.append(pending)
        self._waiting.append((pending, task))

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
    file: LocalFile, size: int, groups: list[_Group], tensors: list[StoredTensor]
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


def _hash_group(file: LocalFile, group: _Group, found: FileDigests, crcs: dict[int, int]) -> None:
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


def _hash_strided(file: LocalFile, tensor: StoredTensor, found: FileDigests) -> None:
    found.tensors[tensor] = strided_sha256(
        tensor, lambda offset, nbytes: (bytes(chunk) for chunk in file.chunks(offset, nbytes))
    )
