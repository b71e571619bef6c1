"""Digests of a file of this machine, on all its cores, while it may still be written.

Groups of neighbouring records are hashed side by side: SHA-256 of each tensor, CRC-32 of each record and of
what lies between them. The file's own SHA-256 is the one serial lane (`serial.py`); its thread then takes
groups that no other one has begun. So the copy and its proof overlap, and neither waits for the other.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

from ptbin.cores import available_cores, busy_core, hashing_pool, hashing_slot
from ptbin.proof.groups import Group, GroupHash, cut_into_groups
from ptbin.proof.local_file import LocalFile
from ptbin.proof.regions import strided_sha256
from ptbin.proof.serial import Serial, SerialLane
from ptbin.values.crc32 import combine_crc32
from ptbin.values.digests import FileDigests, StoredTensor

GROUP_NBYTES = 16 << 20
PROGRESS_SECONDS = 0.1
AHEAD_NBYTES = 128 << 20
AHEAD_CORES = 4
"""Where there are that many cores, one of them reads what the serial lane is about to hash."""
FOLLOWED_NBYTES = 128 << 20
"""A group at least this large is hashed while it is still being written, one at a time."""


class GrowingFile:
    """Digests of an open file of this machine whose first bytes are final while the rest is being written.

    `reached` says how far that is, from the thread that writes; `finish` waits for the digests, `give_up` for
    the threads to stop using the descriptor. One of the two must be called before it is closed.

    Args:
        size: the bytes that the file will have in the end.
        follow: hash from now on, on extra threads for this file; without, from `finish` on.
        read: called with a range that the file no longer holds; raises the error to report.
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
        serial: Serial = "file",
    ) -> None:
        distinct = dict.fromkeys(tensors)
        streamed = [tensor for tensor in distinct if tensor.stride is None]
        self._size = size
        self._strided = [tensor for tensor in distinct if tensor.stride is not None]
        self._groups = cut_into_groups(size, dict.fromkeys(records), streamed, GROUP_NBYTES)
        self._serial = SerialLane(serial, size, streamed)
        self._file = LocalFile(descriptor, read)
        self._found = FileDigests()
        self._crcs: dict[int, int] = {}
        self._begun = 0
        self._pending: list[Future[None]] = []
        self._waiting: list[tuple[Future[None], Callable[[], None]]] = []
        self._own = ThreadPoolExecutor(2, thread_name_prefix="ptbin-follow") if follow else None
        self._ahead: ThreadPoolExecutor | None = None
        if size >= AHEAD_NBYTES and available_cores() >= AHEAD_CORES:
            self._ahead = ThreadPoolExecutor(1, thread_name_prefix="ptbin-ahead")
        self._counts_serial = serial == "file"
        self._hashed: deque[int] = deque()  # bytes not yet reported to progress
        self._following = self._own.submit(self._hash_serially) if self._own is not None else None
        self._followed: Future[None] | None = None
        self._writing = ExitStack()  # the thread that writes has a core to itself, until all is written
        if follow:
            self._writing.enter_context(busy_core())

    def reached(self, position: int) -> None:
        """The first `position` bytes are what they will be."""
        self._file.reached(position)
        if position >= self._size:
            self._writing.close()
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
        ready.sort(key=lambda group: -group.nbytes)
        for group in ready:
            self._submit(functools.partial(self._hash, group))

    def _may_follow(self, group: Group) -> bool:
        free = self._followed is None or self._followed.done()
        return self._own is not None and free and group.nbytes >= FOLLOWED_NBYTES

    def finish(self, progress: Callable[[int], None] | None = None) -> FileDigests:
        """The digests, once all of the file has been reached. Raises what reading the file raised."""
        for tensor in self._strided:
            self._submit(functools.partial(self._hash_strided, tensor))
        if self._following is None:
            self._hash_serially(progress)
        else:
            self._wait_for(self._following, progress)
        for pending, task in reversed(self._waiting):
            if pending.cancel():
                task()  # no other thread has begun it
                self._report(progress)
        for pending in self._pending:
            if not pending.cancelled():
                self._wait_for(pending, progress)
        self._end_threads()
        found = self._found
        self._serial.finish(found)
        for group in self._groups:
            found.crc32 = combine_crc32(found.crc32, self._crcs[group.start], group.nbytes)
        return found

    def _wait_for(self, pending: Future[None], progress: Callable[[int], None] | None) -> None:
        while progress is not None and not pending.done():
            wait([pending], PROGRESS_SECONDS)
            self._report(progress)
        pending.result()
        self._report(progress)

    def _report(self, progress: Callable[[int], None] | None) -> None:
        """What the threads have hashed since the last time."""
        if progress is None:
            return
        nbytes = 0
        while self._hashed:
            nbytes += self._hashed.popleft()
        if nbytes:
            progress(nbytes)

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
        self._end_threads()

    def _end_threads(self) -> None:
        self._writing.close()
        for pool in (self._own, self._ahead):
            if pool is not None:
                pool.shutdown()

    def _hash_serially(self, progress: Callable[[int], None] | None = None) -> None:
        with busy_core():
            for offset, nbytes in self._serial.ranges:
                position = offset
                for chunk in self._serial_chunks(offset, nbytes):
                    self._serial.take(position, chunk)
                    position += len(chunk)
                    if self._counts_serial:
                        self._hashed.append(len(chunk))
                        self._report(progress)

    def _serial_chunks(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        if self._ahead is not None and nbytes >= AHEAD_NBYTES:
            return self._file.chunks_ahead(self._ahead, offset, nbytes)
        return self._file.chunks(offset, nbytes)

    def _hash(self, group: Group) -> None:
        hashing = GroupHash(group)
        position = group.start
        for chunk in self._file.chunks(group.start, group.nbytes):
            with hashing_slot():
                hashing.take(position, chunk)
            position += len(chunk)
            if not self._counts_serial:
                self._hashed.append(len(chunk))
        self._crcs[group.start] = hashing.finish(self._found)

    def _hash_strided(self, tensor: StoredTensor) -> None:
        self._found.tensors[tensor] = strided_sha256(tensor, self._file.pieces)
