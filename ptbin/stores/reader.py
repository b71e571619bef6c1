"""Reading: random access to one object, pinned to the state it was in when it was opened.

Memory is bounded by the reader's window of bytes under way, never by a size in a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, ClassVar, TypeVar

from ptbin.stores.ranges import Fetch, plan_fetches
from ptbin.stores.values import MIB, Identity, check_range, refuse_other_object
from ptbin.values.crc32 import crc32_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from types import TracebackType
    from typing import Self

    WriteAt = Callable[[int, memoryview], None]

T = TypeVar("T")


class RangeReader(ABC):
    """Random access to one object, pinned to the state it was in when this reader was opened.

    `requests` and `bytes_read` count what was asked of the store for content, retries and discarded
    gaps included; stat calls are not counted.
    """

    is_shareable: ClassVar[bool] = False
    """Whether several threads may read at once."""

    gap_nbytes: ClassVar[int] = 0
    """Two ranges at most this far apart are fetched as one: a request costs more than these bytes."""
    best_chunk_nbytes: ClassVar[int] = 8 * MIB
    window_nbytes: int = 0
    """So many bytes may be under way or waiting to be consumed, in chunks; 0: one chunk at a time."""
    max_under_way: int = 1
    """So many requests at once, however small they are."""

    def __init__(self, uri: str, size: int, identity: Identity) -> None:
        self.uri = uri
        self.size = size
        self.identity = identity
        self.requests = 0
        self.bytes_read = 0

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`, as one request (none for zero bytes).

        Raises:
            CorruptArchiveError: the range lies outside of the object.
            SourceChangedError: the object is not the one that was opened.
            StorageError: the store failed, retries included.
        """
        check_range(self.uri, self.size, offset, nbytes)
        return self._read(offset, nbytes) if nbytes else b""

    def _read(self, offset: int, nbytes: int) -> bytes:
        """As `read`, of a range in the object that is not empty. A reader of readers gives `read` itself."""
        raise NotImplementedError

    def expecting(self, expected: Identity | None) -> Self:
        """This reader; where it is of another state it is closed, and SourceChangedError raised."""
        if expected is not None and self.identity != expected:
            self.close()
            refuse_other_object(self.uri, self.identity, expected)
        return self

    @abstractmethod
    def check_unchanged(self) -> None:
        """Ask the store again; SourceChangedError where the name now holds something else."""

    def confirm(self) -> None:
        """Raise SourceChangedError unless all that was read or copied is of the state that was opened.

        Here by asking again; where the store has vouched for it with every answer, that is needless.
        """
        self.check_unchanged()

    def start_fetch(self, fetch: Fetch) -> Callable[[], list[bytes]]:
        """Begin `fetch`, return what waits for its blocks. Here: nothing begins before it is waited for."""
        return lambda: [self.read(fetch.offset, fetch.nbytes)]

    def iter_range(self, offset: int, nbytes: int, *, chunk_nbytes: int | None = None) -> Iterator[bytes]:
        """The range in order, in pieces of at most `chunk_nbytes` (None: what suits the store)."""
        for _, piece in self.iter_ranges(((offset, nbytes),), chunk_nbytes=chunk_nbytes):
            yield piece

    def iter_ranges(
        self,
        ranges: Sequence[tuple[int, int]],
        *,
        chunk_nbytes: int | None = None,
        gap_nbytes: int | None = None,
    ) -> Iterator[tuple[int, bytes]]:
        """(index of the range, next piece of it), in the order given; empty ranges give no piece.

        Ascending neighbours share a request where the gap is at most `gap_nbytes` (None: what suits the
        store). Memory: `window_nbytes`, or one chunk. A generator closed early cancels what is in flight.
        """
        for offset, nbytes in ranges:
            check_range(self.uri, self.size, offset, nbytes)
        chunk = chunk_nbytes or self.best_chunk_nbytes
        gap = self.gap_nbytes if gap_nbytes is None else gap_nbytes
        fetches = plan_fetches(ranges, chunk_nbytes=chunk, gap_nbytes=gap)
        under_way = 0
        waiting: deque[tuple[Fetch, Callable[[], list[bytes]]]] = deque()
        try:
            for fetch in fetches:
                while waiting and (
                    under_way + fetch.nbytes > self.window_nbytes or len(waiting) >= self.max_under_way
                ):
                    under_way -= waiting[0][0].nbytes
                    yield from _pieces(*waiting.popleft())
                waiting.append((fetch, self.start_fetch(fetch)))
                under_way += fetch.nbytes
            while waiting:
                yield from _pieces(*waiting.popleft())
        finally:
            for _, wait in waiting:
                if isinstance(wait, Pending):
                    wait.cancel()

    def scatter(
        self, ranges: Sequence[tuple[int, int]], targets: Sequence[int], write_at: WriteAt
    ) -> Iterator[tuple[int, int, int]]:
        """Hand every range to `write_at`, from its target on; yield what has got there.

        Yields (index of the range, CRC-32 of its next bytes, how many), in the order given. `write_at` may be
        called by several threads, in any order, and again for the same bytes. A generator that is closed
        has no thread at work any more.
        """
        done = [0] * len(ranges)
        for index, piece in self.iter_ranges(ranges):
            write_at(targets[index] + done[index], memoryview(piece))
            done[index] += len(piece)
            yield index, crc32_of(piece), len(piece)

    def fileno(self) -> int | None:
        """The open descriptor of a local file, for `copy_file_range`; None for anything else."""
        return None

    @property
    def is_local(self) -> bool:
        """Whether ranges lie in files of this machine, which the kernel can move."""
        return self.fileno() is not None

    @property
    def server_side_store(self) -> object | None:
        """What stands for the store that holds all of this, where a writer to it could copy inside."""
        return None

    def locate(self, offset: int, nbytes: int) -> tuple[RangeReader, int]:
        """The reader of the one object that holds a range, and the range's offset there."""
        check_range(self.uri, self.size, offset, nbytes)
        return self, offset

    def close(self) -> None:  # noqa: B027 - most readers hold nothing open
        """Release what the reader holds; harmless twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_for(future: Future[T]) -> T:
    """The result; where waiting is interrupted, the work ends as well."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


class Pending:
    """A fetch that is under way on another thread; calling it waits for the blocks.

    `explain` may turn the failure of the wait it is given into a better one.
    """

    def __init__(
        self,
        future: Future[list[bytes]],
        explain: Callable[[Callable[[], list[bytes]]], list[bytes]] = lambda wait: wait(),
    ) -> None:
        self.cancel = future.cancel
        self._wait = partial(explain, partial(wait_for, future))

    def __call__(self) -> list[bytes]:
        return self._wait()


def _pieces(fetch: Fetch, wait: Callable[[], list[bytes]]) -> Iterator[tuple[int, bytes]]:
    """What of the fetched blocks belongs to the ranges; each block is let go of once it was handed out."""
    blocks = deque(wait())
    begin = 0
    for piece in fetch.pieces:
        position = piece.start
        while position < piece.stop:
            block = blocks[0]
            end = begin + len(block)
            last = min(end, piece.stop)
            if end <= last:  # nothing behind `last` is in it
                blocks.popleft()
            if position < last:
                whole = last - position == len(block)
                yield piece.index, block if whole else block[position - begin : last - begin]
                position = last
            if end <= last:
                begin = end
