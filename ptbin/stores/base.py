"""The two ends of every transfer, as abstract classes and frozen values.

Owns what a store promises: a reader is *pinned* (each byte it hands out belongs to the object that was
seen first, or it raises `SourceChangedError`), a writer is *whole or nothing* (before `commit` nobody
can see a byte under the final name, after `abort` nothing remains). Knows neither a backend nor what
the bytes mean. A path is what a store calls an object ("bucket/key", "/data/x.bin"); a URI is what a
user writes and what manifests and messages carry, so it never holds a password.

Cost: memory is bounded by `chunk_nbytes` times the backend's read-ahead window, never by a size in a file.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

from ptbin.errors import CorruptArchiveError, LimitExceededError, SourceChangedError, StorageError
from ptbin.stores.parts import Part, Stretch
from ptbin.stores.ranges import Fetch, plan_fetches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from types import TracebackType
    from typing import Self

    WriteAt = Callable[[int, memoryview], None]

__all__ = [
    "PARTIAL_SUFFIX",
    "CopyRefused",
    "Identity",
    "ListedObject",
    "ObjectStat",
    "Pending",
    "RangeReader",
    "Store",
    "Writer",
    "check_range",
    "is_partial_name",
    "refuse_other_object",
]

MIB = 1 << 20

PARTIAL_SUFFIX = ".ptbin-partial"
"""Last part of every temporary name; listings pass such names over, so no output is ever taken from one."""

READ_BYTES_LIMIT = 256 * MIB

IdentityKind = Literal["etag", "version_id", "mtime", "checksum", "uid", "parts"]


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one state of an object from another: equal where nothing was written in between.

    An `etag` is written without its quotes; an `mtime` is "<nanoseconds or ISO time>-<size>".
    """

    kind: IdentityKind
    value: str

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, "value": self.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Identity:
        """Raises ValueError where `data` is not what `to_json` writes (a manifest edited by hand)."""
        kind, value = data.get("kind"), data.get("value")
        if kind not in get_args(IdentityKind) or not isinstance(value, str):
            raise ValueError(f"{dict(data)!r} is not an object's identity (kind and value)")
        return cls(cast("IdentityKind", kind), value)


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What a store says of one object; `size` in bytes."""

    uri: str
    size: int
    identity: Identity


@dataclass(frozen=True, slots=True)
class ListedObject:
    """One line of a recursive listing; `path` is relative to the listed root, '/'-separated.

    On object stores `path` is whatever the key says: it may hold `..` or `//`, and must be checked
    before it becomes a path anywhere else.
    """

    path: str
    uri: str
    size: int
    identity: Identity | None


class CopyRefused(StorageError):  # noqa: N818 - an answer, not a fault
    """The store will not copy this by itself; the same bytes can still be streamed to a new writer."""


def is_partial_name(path: str) -> bool:
    """Whether the last part of `path` is a temporary name of an unfinished output."""
    return path.endswith(PARTIAL_SUFFIX)


def check_range(uri: str, size: int, offset: int, nbytes: int) -> None:
    """Refuse a range that does not lie in the object; such ranges come from a damaged index.

    Raises:
        CorruptArchiveError: any part of the range is outside of the object's `size` bytes.
    """
    if offset < 0 or nbytes < 0 or offset + nbytes > size:
        raise CorruptArchiveError(
            f"bytes {offset} to {offset + nbytes} were asked of {uri}, which holds {size}: "
            "its index points outside of it, or the file was cut short"
        )


def refuse_other_object(uri: str, found: Identity, expected: Identity) -> None:
    """Raises SourceChangedError where `found` is not `expected`."""
    if found != expected:
        raise SourceChangedError(
            f"{uri} is not the object seen first: found {found.kind} {found.value}, "
            f"expected {expected.value}; convert it again once nothing writes to it"
        )


class RangeReader(ABC):
    """Random access to one object, pinned to the state it was in when this reader was opened.

    `requests` and `bytes_read` count what was asked of the store for content, retries and discarded
    gaps included; stat calls are not counted. Not safe for use by several threads at once.
    """

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

    @abstractmethod
    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`, as one request (none for zero bytes).

        Raises:
            CorruptArchiveError: the range lies outside of the object.
            SourceChangedError: the object is not the one that was opened.
            StorageError: the store failed, retries included.
        """

    @abstractmethod
    def check_unchanged(self) -> None:
        """Ask the store again; SourceChangedError where the name now holds something else."""

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
        with self._window() as waiting:
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
            yield index, zlib.crc32(piece), len(piece)

    @contextmanager
    def _window(self) -> Iterator[deque[tuple[Fetch, Callable[[], list[bytes]]]]]:
        waiting: deque[tuple[Fetch, Callable[[], list[bytes]]]] = deque()
        try:
            yield waiting
        finally:
            for _, wait in waiting:
                if isinstance(wait, Pending):
                    wait.cancel()

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


class Pending:
    """A fetch that is under way on another thread; calling it waits for the blocks.

    `explain` may turn the failure of the wait it is given into a better one.
    """

    __slots__ = ("_explain", "_future")

    def __init__(
        self,
        future: Future[list[bytes]],
        explain: Callable[[Callable[[], list[bytes]]], list[bytes]] | None = None,
    ) -> None:
        self._future = future
        self._explain = explain

    def __call__(self) -> list[bytes]:
        try:
            return self._explain(self._future.result) if self._explain else self._future.result()
        except BaseException:
            self._future.cancel()  # an interrupted wait must not leave the request running
            raise

    def cancel(self) -> None:
        self._future.cancel()


def _pieces(fetch: Fetch, wait: Callable[[], list[bytes]]) -> Iterator[tuple[int, bytes]]:
    """What of the fetched blocks belongs to the ranges; each block is let go of once it was handed out."""
    blocks = deque(wait())
    begin = 0
    for piece in fetch.pieces:
        position = piece.start
        while position < piece.stop:
            block = blocks[0]
            end = begin + len(block)
            if end <= position:
                blocks.popleft()
                begin = end
                continue
            last = min(end, piece.stop)
            if last == end:
                blocks.popleft()
                begin, start = end, position - end + len(block)
            else:
                start = position - begin
            yield (
                piece.index,
                block if last - position == len(block) else block[start : start + last - position],
            )
            position = last


class Writer(ABC):
    """One output, appended to in order; leaving the `with` block without `commit()` aborts it."""

    bytes_copied: int
    """How many of `bytes_written` the store copied by itself, without their coming through this machine."""
    expected_crc32: int | None
    """CRC-32 of all that was written; set before `commit`: stores that can check it do, and then publish."""
    checks_crc32: bool = False
    """Known after `lay_out`: the store will compare the CRC-32 of what it keeps with `expected_crc32`."""
    identity: Identity | None = None
    """What was published, once `commit` returned; None where the store does not say it of its own accord."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.bytes_written = 0
        self.bytes_copied = 0
        self.expected_crc32: int | None = None
        self._open = True

    @abstractmethod
    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data`; it may be reused as soon as this returns."""

    @abstractmethod
    def _publish(self) -> None: ...

    @abstractmethod
    def _discard(self) -> None: ...

    scatters: ClassVar[bool] = False
    """Whether bytes may be put at any place, by several threads: `write_at`, then `advance`."""

    def write_at(self, position: int, data: memoryview) -> None:
        """Put bytes at a place that `advance` has yet to pass; only where `scatters`."""
        raise NotImplementedError

    def advance(self, nbytes: int) -> None:
        """The next `nbytes` have been put there by `write_at`."""
        raise NotImplementedError

    def moves_from(self, reader: RangeReader) -> bool:
        """Whether `copy_from` may work for ranges of `reader`; costs no request."""
        del reader
        return False

    def lay_out(self, stretches: Sequence[Stretch]) -> list[Part]:
        """Foretell the whole output, and what of it could be copied; before the first byte, or not at all.

        Returns the parts in which the store wants it: a copied part is then one call of `copy_from`, all
        else is written. Empty where nothing is worth copying.
        """
        parts = []
        start = 0
        for stretch in stretches:
            parts.append(Part(start, stretch.nbytes, stretch.copyable))
            start += stretch.nbytes
        return parts

    def copy_from(self, reader: RangeReader, offset: int, nbytes: int) -> bool:
        """Append a range of `reader` by the cheapest kernel or server-side move.

        False: "cannot, please stream"; then nothing was appended.

        Raises:
            CopyRefused: here or in `commit`: the store would not; begin again with a writer that streams.
        """
        del reader, offset, nbytes
        return False

    def settle(self) -> None:  # noqa: B027 - most writers have nothing under way
        """Wait until all that was handed over has arrived; only then is it known what was copied."""

    def commit(self) -> None:
        """Make the output visible, whole, under its name; where this fails, the writer is aborted."""
        if not self._open:
            raise ValueError(f"the writer of {self.uri} is closed")
        try:
            self._publish()
        except BaseException:
            self.abort()
            raise
        self._open = False

    def abort(self) -> None:
        """Forget what was written. Never raises for a failing store and never hides an earlier error."""
        if self._open:
            self._open = False
            self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class Store(ABC):
    """One place that holds objects by path. Every error it raises is one of `ptbin.errors`."""

    protocol: str

    @abstractmethod
    def uri_of(self, path: str) -> str:
        """The URI of `path`, fit for manifests and messages: never with a password in it."""

    @abstractmethod
    def stat(self, path: str) -> ObjectStat:
        """Size and identity, by one request. Raises NotFoundInStoreError (a directory is no object)."""

    @abstractmethod
    def is_directory(self, path: str) -> bool:
        """Whether `path` is a directory, or a prefix with anything below it."""

    @abstractmethod
    def iter_objects(self, path: str) -> Iterator[ListedObject]:
        """Everything below `path`, lazily and never from a cache; nothing where there is no such prefix.

        Unfinished outputs are passed over. Raises NotFoundInStoreError where the bucket is missing.
        """

    @abstractmethod
    def open_reader(self, path: str, *, expected: Identity | None = None) -> RangeReader:
        """Pin the object. Raises SourceChangedError where its identity is not `expected`."""

    @abstractmethod
    def open_writer(self, path: str, *, size_hint: int | None = None, copies: bool = True) -> Writer:
        """Begin an output; `size_hint` (bytes to come) lets a store choose its part size.

        `copies` false: everything is to come through `write`.
        """

    def crc32_of(self, path: str) -> int | None:
        """The CRC-32 of a whole object, computed by the store from what it keeps; None: it has none."""
        del path
        return None

    @abstractmethod
    def delete(self, path: str) -> None:
        """See that nothing is at `path`; no error where nothing was."""

    @abstractmethod
    def check_writable(self, path: str) -> None:
        """Find out early whether outputs could be written to or below `path`; leaves nothing behind.

        Raises:
            NotFoundInStoreError: there is no such bucket.
            AccessDeniedError: these credentials, or this user, may not write there.
            StorageError: anything else that would make every write fail.
        """

    def read_bytes(self, path: str, *, limit: int = READ_BYTES_LIMIT) -> bytes:
        """A whole small object. Raises LimitExceededError where it is larger than `limit` bytes."""
        with self.open_reader(path) as reader:
            refuse_too_large(reader.uri, reader.size, limit)
            return reader.read(0, reader.size)

    def read_identified(self, path: str, *, limit: int = READ_BYTES_LIMIT) -> tuple[bytes, Identity]:
        """A whole small object, and which state of it that is; errors as `read_bytes`."""
        with self.open_reader(path) as reader:
            refuse_too_large(reader.uri, reader.size, limit)
            return reader.read(0, reader.size), reader.identity

    def write_bytes(self, path: str, data: bytes) -> Identity | None:
        """Write a whole small object, or nothing; its identity where the store tells it by itself."""
        with self.open_writer(path, size_hint=len(data)) as writer:
            writer.write(data)
            writer.commit()
            return writer.identity


def refuse_too_large(uri: str, size: int, limit: int) -> None:
    """Raises LimitExceededError for an object that is to be held in memory and is too large for it."""
    if size > limit:
        raise LimitExceededError(f"{uri} holds {size} bytes; at most {limit} are read into memory at once")
