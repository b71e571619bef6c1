"""Ranged GETs of one S3 object, each of them conditional.

Owns the pin: every request carries `IfMatch` (and `VersionId` where the bucket keeps versions), every
answer's ETag and length are checked, so that bytes of two states of an object never mix. Sequential
reading keeps `window_nbytes` under way or waiting to be consumed: 32 MiB of memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ptbin.errors import NotFoundInStoreError, SourceChangedError, StorageError
from ptbin.stores.ranges import Fetch, Piece, plan_fetches
from ptbin.stores.reader import Pending, RangeReader
from ptbin.stores.values import MIB, Identity, ObjectStat, check_range, refuse_other_object
from ptbin.values.crc32 import crc32_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from ptbin.stores.reader import WriteAt
    from ptbin.stores.s3_client import Consume, S3Client, S3Object

SCATTER_NBYTES = 32 * MIB
"""A request of a transfer to a place that takes bytes in any order: nothing is kept, so it may be large."""
SCATTERS = 6
HANDED_OVER_NBYTES = 1 * MIB
"""Blocks go from the loop to the thread that writes them so many bytes at a time: waking it costs."""
ROOM = 24
"""So many of these may wait to be written."""


@dataclass(frozen=True, slots=True)
class S3Stat(ObjectStat):
    """What the first answer said of an object.

    Attributes:
        version_id: where its bucket keeps versions.
        tail: its last bytes; all of them where it is small.
    """

    version_id: str | None = None
    tail: bytes = b""


def etag_of(answer: Mapping[str, Any]) -> str:
    """The ETag without its quotes; empty where the store gives none."""
    return str(answer.get("ETag") or "").strip('"')


class S3Reader(RangeReader):
    """Made by `S3Store.open_reader`, which has just asked for size, ETag, version id and the last bytes."""

    gap_nbytes = 256 * 1024
    best_chunk_nbytes = 8 * MIB
    window_nbytes = 32 * MIB
    max_under_way = 16

    def __init__(self, at: S3Object, found: S3Stat) -> None:
        super().__init__(found.uri, found.size, found.identity)
        self._at = at
        self._client = at.client
        self._etag = found.identity.value
        self._tail = found.tail
        self._tail_start = found.size - len(found.tail)
        self._tail_counted = False
        self._match = {"IfMatch": f'"{self._etag}"'} if self._etag else {}
        self._version = {"VersionId": found.version_id} if found.version_id is not None else {}

    @property
    def _is_whole(self) -> bool:
        """Whether the first answer held all of the object."""
        return self._tail_start == 0

    def _held(self, offset: int, nbytes: int) -> bytes | None:
        """A range that came with the first answer; that request is counted once it proves to be of use."""
        if offset < self._tail_start:
            return None
        if not self._tail_counted:
            self._tail_counted = True
            self.requests += 1
            self.bytes_read += len(self._tail)
        start = offset - self._tail_start
        return self._tail[start : start + nbytes]

    def _read(self, offset: int, nbytes: int) -> bytes:
        """More than two chunks come as several requests at once."""
        if nbytes > 2 * self.best_chunk_nbytes and self._held(offset, nbytes) is None:
            return b"".join(self.iter_range(offset, nbytes))
        return b"".join(self.start_fetch(Fetch(offset, nbytes, ()))())

    def start_fetch(self, fetch: Fetch) -> Callable[[], list[bytes]]:
        held = self._held(fetch.offset, fetch.nbytes)
        if held is not None:
            return lambda: [held]

        async def get() -> list[bytes]:
            blocks: list[bytes] = []
            await self._get(fetch.offset, fetch.nbytes, blocks.append)
            return blocks

        return Pending(self._client.start(get))

    def scatter(
        self, ranges: Sequence[tuple[int, int]], targets: Sequence[int], write_at: WriteAt
    ) -> Iterator[tuple[int, int, int]]:
        """As the base says, block by block: the loop receives the next ones while this thread writes."""
        if self._is_whole:
            yield from super().scatter(ranges, targets, write_at)
            return
        for offset, nbytes in ranges:
            check_range(self.uri, self.size, offset, nbytes)
        reached = list(targets)
        fetches = plan_fetches(ranges, chunk_nbytes=SCATTER_NBYTES, gap_nbytes=self.gap_nbytes)
        arrived = _Arrivals(self._client.loop)
        under_way: deque[_Scattering] = deque()
        try:
            for fetch in fetches:
                if len(under_way) >= SCATTERS:
                    yield from arrived.all_of(under_way[0])
                    under_way.popleft()
                scattering = _Scattering(fetch, reached, write_at)
                under_way.append(scattering)
                get = partial(self._get, fetch.offset, fetch.nbytes, partial(arrived.put, scattering))
                scattering.future = self._client.start(get)
                scattering.future.add_done_callback(partial(arrived.end, scattering))
            while under_way:
                yield from arrived.all_of(under_way[0])
                under_way.popleft()
        finally:
            for scattering in under_way:
                if scattering.future is not None:
                    scattering.future.cancel()

    async def _get(self, offset: int, nbytes: int, consume: Consume) -> None:
        """A range, block by block; what breaks off is taken up where it broke off."""
        done = 0

        def count(block: bytes) -> Awaitable[None] | None:
            nonlocal done
            done += len(block)
            self.bytes_read += len(block)
            return consume(block)

        async def attempt() -> None:
            if done < nbytes:
                await self._get_once(offset + done, nbytes - done, count)
            if done != nbytes:
                raise StorageError(
                    f"cannot read {self.uri}: {done} of {nbytes} bytes came at offset {offset}",
                    transient=True,
                )

        await self._client.arepeated(attempt)

    async def _get_once(self, offset: int, nbytes: int, consume: Consume) -> None:
        self.requests += 1

        def accept(answer: dict[str, Any]) -> None:
            if etag_of(answer) == self._etag and answer["ContentLength"] == nbytes:
                return
            refuse_other_object(self.uri, Identity("etag", etag_of(answer)), self.identity)
            raise StorageError(
                f"cannot read {self.uri}: {nbytes} bytes were asked and {answer['ContentLength']} announced: "
                "the server ignores ranges"
            )

        last = offset + nbytes - 1  # inclusive (RFC 9110, 14.1.2)
        try:
            pin = self._match | self._version
            await self._at.fetch(accept, consume, **pin, Range=f"bytes={offset}-{last}")
        except NotFoundInStoreError as error:
            raise SourceChangedError(f"{self.uri} was deleted while it was read") from error
        except StorageError as error:
            if "InvalidRange" in str(error):  # the range lies in the pinned object: so this is another one
                raise SourceChangedError(f"{self.uri} was overwritten while it was read") from error
            raise

    @property
    def server_side_store(self) -> S3Client | None:
        # Ceph 16 decodes the name of a copy's source twice: it would take another object, or none.
        return None if {"%", "?"} & set(self._at.key) else self._client

    @property
    def copy_source(self) -> dict[str, Any]:
        """Arguments of `upload_part_copy` that name this very state of the object.

        Some servers ignore the ETag here (Ceph does): whoever copies asks `check_unchanged` afterwards.
        """
        return {
            "CopySource": self._at.names | self._version,
            **{f"CopySource{name}": etag for name, etag in self._match.items()},
        }

    def confirm(self) -> None:
        """Nothing where one answer held all of it; else as `check_unchanged`, for the sake of copies."""
        if not self._is_whole:
            self.check_unchanged()

    def check_unchanged(self) -> None:
        """One HEAD of the name, whatever version was read."""
        try:
            answer = self._at.call("head_object")
        except NotFoundInStoreError as error:
            raise SourceChangedError(f"{self.uri} was deleted while it was read") from error
        refuse_other_object(self.uri, Identity("etag", etag_of(answer)), self.identity)


class _Scattering:
    """One fetch on its way to where its ranges are to be; `reached` are the ranges' next targets."""

    def __init__(self, fetch: Fetch, reached: list[int], write_at: WriteAt) -> None:
        self.future: Future[None] | None = None
        self.finished = False
        self.received: list[bytes] = []
        self.received_nbytes = 0
        self.jobs: list[tuple[Piece, int]] = []
        for piece in fetch.pieces:
            self.jobs.append((piece, reached[piece.index]))
            reached[piece.index] += piece.stop - piece.start
        self.crc32 = [0] * len(self.jobs)
        self._write_at = write_at
        self._position = 0
        self._job = 0

    def consume(self, block: bytes) -> None:
        view = memoryview(block)
        begin, end = self._position, self._position + len(block)
        while self._job < len(self.jobs):
            piece, target = self.jobs[self._job]
            first, last = max(piece.start, begin), min(piece.stop, end)
            if first < last:
                part = view[first - begin : last - begin]
                self.crc32[self._job] = crc32_of(part, self.crc32[self._job])
                self._write_at(target + first - piece.start, part)
            if piece.stop > end:
                break
            self._job += 1
        self._position = end


class _Arrivals:
    """Blocks on their way from the loop, which receives them, to the thread that writes them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._room = asyncio.Semaphore(ROOM)
        self._queue: SimpleQueue[tuple[_Scattering, list[bytes], bool]] = SimpleQueue()

    async def put(self, scattering: _Scattering, block: bytes) -> None:
        scattering.received.append(block)
        scattering.received_nbytes += len(block)
        if scattering.received_nbytes >= HANDED_OVER_NBYTES:
            await self._room.acquire()
            self._hand_over(scattering, last=False)

    def _hand_over(self, scattering: _Scattering, *, last: bool) -> None:
        self._queue.put((scattering, scattering.received, last))
        scattering.received, scattering.received_nbytes = [], 0

    def end(self, scattering: _Scattering, _: Future[None]) -> None:
        self._hand_over(scattering, last=True)

    def all_of(self, awaited: _Scattering) -> Iterator[tuple[int, int, int]]:
        """Write what comes until all of `awaited` has come; its ranges, as `scatter` yields them."""
        while not awaited.finished:
            scattering, blocks, last = self._queue.get()
            for block in blocks:
                scattering.consume(block)
            if not last:
                self._loop.call_soon_threadsafe(self._room.release)
                continue
            assert scattering.future is not None
            scattering.future.result()
            scattering.finished = True
        for (piece, _), crc32 in zip(awaited.jobs, awaited.crc32, strict=True):
            yield piece.index, crc32, piece.stop - piece.start
