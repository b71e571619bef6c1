"""Pieces of an open file of this machine, for several threads that hash it while it may still grow."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait

BUFFER_NBYTES = 2 << 20
"""What is read of a local file at once: little enough to lie in a core's cache while it is hashed."""
MAX_KEPT_NBYTES = 64 << 20
AHEAD = 2
"""Buffers that are filled while one is used."""
_buffers: dict[int, list[bytearray]] = {}
"""Buffers that no thread uses at the moment, by their size. A fresh one costs a page fault for every 4 KiB,
for which all threads of a process queue.
"""


def _buffer(nbytes: int, most: int = BUFFER_NBYTES) -> bytearray:
    if nbytes < most:
        return bytearray(nbytes)
    try:
        return _buffers[most].pop()
    except LookupError:
        return bytearray(most)


def _keep(buffers: Iterable[bytearray]) -> None:
    """Keep buffers for later use, up to a limit."""
    for buffer in buffers:
        kept = _buffers.setdefault(len(buffer), []) if len(buffer) >= BUFFER_NBYTES else None
        if kept is not None and (len(kept) + 1) * len(buffer) <= MAX_KEPT_NBYTES:
            kept.append(buffer)


class LocalFile:
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
        """Make threads that still read stop."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def _wait_for(self, end: int) -> None:
        if self._final < end or self._given_up:
            with self._changed:
                self._changed.wait_for(lambda: self._final >= end or self._given_up)
            if self._given_up:
                raise CancelledError

    def chunks(self, offset: int, nbytes: int, *, most: int = BUFFER_NBYTES) -> Iterator[memoryview]:
        if not nbytes:
            return
        buffer = _buffer(nbytes, most)
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
            _keep([buffer])

    def chunks_ahead(self, pool: ThreadPoolExecutor, offset: int, nbytes: int) -> Iterator[memoryview]:
        """As `chunks`, each read by a thread of `pool` while those before it are used.

        A serial digest gains a quarter by it: copying out of the page cache takes that long.
        """
        free = deque(_buffer(BUFFER_NBYTES) for _ in range(AHEAD + 1))
        taken: list[bytearray] = []
        coming: deque[tuple[Future[memoryview], bytearray]] = deque()
        end = offset + nbytes
        try:
            while offset < end or coming:
                while offset < end and free:
                    size = min(BUFFER_NBYTES, end - offset)
                    buffer = free.popleft()
                    coming.append((pool.submit(self._fill, memoryview(buffer)[:size], offset), buffer))
                    offset += size
                piece, buffer = coming.popleft()
                taken.append(buffer)
                yield piece.result()
                free.append(taken.pop())
        finally:
            for piece, _ in coming:
                piece.cancel()
            wait([piece for piece, _ in coming])
            _keep([*free, *taken, *(buffer for _, buffer in coming)])

    def _fill(self, view: memoryview, offset: int) -> memoryview:
        """Fill all of `view` from the file; where the file ends before, `read` raises."""
        done = 0
        self._wait_for(offset + len(view))
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done:]], offset + done)
            if not got:
                rest = self._read(offset + done, len(view) - done)
                view[done : done + len(rest)] = rest
                got = len(rest)
            done += got
        return view

    def pieces(self, offset: int, nbytes: int) -> Iterator[bytes]:
        """As `chunks`, each to be kept."""
        return (bytes(chunk) for chunk in self.chunks(offset, nbytes))
