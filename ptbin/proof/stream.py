"""Digests of a file whose bytes arrive once, in order, from elsewhere: on all cores, while more is coming.

The thread that receives computes the file's own SHA-256. What else there is to hash is cut into groups of
neighbouring records, whose bytes wait for a thread in one queue per group; a group lags behind while
the next ones arrive, so that one core's speed limits a single tensor, not the stream.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from ptbin.cores import hashing_pool, hashing_slot
from ptbin.proof.groups import Group, GroupHash, cut_into_groups
from ptbin.proof.serial import Serial, SerialLane
from ptbin.values.crc32 import combine_crc32
from ptbin.values.digests import FileDigests, StoredTensor

GROUP_NBYTES = 8 << 20
WAITING_NBYTES = 32 << 20
"""What may have arrived and not been hashed yet; `take` waits beyond it."""


class StreamHash:
    """Takes chunks in the order of the file; `finish` or `give_up` must be called in the end.

    Args:
        size: bytes of the file.
        tensors: those that are stored contiguously.
    """

    def __init__(
        self, size: int, records: Iterable[tuple[int, int]], tensors: Iterable[StoredTensor], serial: Serial
    ) -> None:
        tensors = list(tensors)
        self._serial = SerialLane(serial, size, tensors)
        self._changed = threading.Condition()
        self._waiting = 0
        self._error: BaseException | None = None
        self._queues = [
            _Queue(group) for group in cut_into_groups(size, dict.fromkeys(records), tensors, GROUP_NBYTES)
        ]
        self._current = 0

    def take(self, position: int, chunk: bytes) -> None:
        """The next bytes; the caller no longer changes them."""
        end = position + len(chunk)
        view = memoryview(chunk)
        at = position
        while at < end:
            queue = self._queues[self._current]
            stop = min(end, queue.group.end)
            self._put(queue, at, view[at - position : stop - position])
            at = stop
            if stop == queue.group.end and self._current < len(self._queues) - 1:
                self._current += 1
        self._serial.take(position, chunk)

    def _put(self, queue: _Queue, position: int, part: memoryview) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting < WAITING_NBYTES or self._error is not None)
            if self._error is not None:
                raise self._error
            self._waiting += len(part)
            queue.parts.append((position, part))
            if queue.is_at_work:
                return
            queue.is_at_work = True
        hashing_pool().submit(self._work_off, queue)

    def _work_off(self, queue: _Queue) -> None:
        """Until nothing waits in it: one thread at a time, since a group is hashed in order."""
        while True:
            with self._changed:
                if not queue.parts:
                    queue.is_at_work = False
                    self._changed.notify_all()
                    return
                position, part = queue.parts.popleft()
            try:
                with hashing_slot():
                    queue.hashing.take(position, part)
            except BaseException as error:  # noqa: BLE001 - raised in the thread that brings the bytes
                self._end(error)
            with self._changed:
                self._waiting -= len(part)
                self._changed.notify_all()

    def finish(self) -> FileDigests:
        """The digests, once all has been hashed."""
        with self._changed:
            self._changed.wait_for(lambda: not any(queue.is_at_work for queue in self._queues))
            if self._error is not None:
                raise self._error
        found = FileDigests()
        for queue in self._queues:
            crc = queue.hashing.finish(found)
            found.crc32 = combine_crc32(found.crc32, crc, queue.group.nbytes)
        self._serial.finish(found)
        return found

    def give_up(self) -> None:
        """The digests are no longer wanted."""
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            self._error = self._error or error
            for queue in self._queues:
                self._waiting -= sum(len(part) for _, part in queue.parts)
                queue.parts.clear()
            self._changed.notify_all()


class _Queue:
    """Bytes of a group that have arrived."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.hashing = GroupHash(group)
        self.parts: deque[tuple[int, memoryview]] = deque()
        self.is_at_work = False
