"""Reading through fsspec's `cat_file`: explicit ranges, no read-ahead, no cache.

Most filesystems cannot make a read conditional, so the pin is kept by `check_unchanged`, which costs one
`info()` and which readers of a whole object call at the end. Asynchronous filesystems (gcs, abfs, http) keep
up to eight requests in flight, the others one.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ptbin.errors import NotFoundInStoreError, SourceChangedError, StorageError
from ptbin.stores.faults import mapped_faults
from ptbin.stores.ranges import Fetch
from ptbin.stores.reader import Pending, RangeReader
from ptbin.stores.requests import RetryPolicy, call_with_retries, call_with_retries_async
from ptbin.stores.values import MIB, ObjectStat, refuse_other_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class Connected(Protocol):
    """What a reader asks of its store."""

    retry: RetryPolicy

    @property
    def fs(self) -> Any:
        """The fsspec filesystem of this process."""

    def stat(self, path: str) -> ObjectStat:
        """Size and identity as they are now."""


class FsspecReader(RangeReader):
    """Ranges by `cat_file`, its arguments named: positional ones mean other things in some backends."""

    gap_nbytes = 256 * 1024
    window_nbytes = 32 * MIB
    max_under_way = 8

    def __init__(self, store: Connected, path: str, found: ObjectStat) -> None:
        super().__init__(found.uri, found.size, found.identity)
        self._store = store
        self._path = path
        self._concurrent = bool(getattr(store.fs, "async_impl", False) and not store.fs.asynchronous)
        if not self._concurrent:
            self.max_under_way = 1

    def _read(self, offset: int, nbytes: int) -> bytes:
        return self.start_fetch(Fetch(offset, nbytes, ()))()[0]

    def start_fetch(self, fetch: Fetch) -> Callable[[], list[bytes]]:
        fs, retry = self._store.fs, self._store.retry
        place = {"start": fetch.offset, "end": fetch.offset + fetch.nbytes}

        def ask() -> list[bytes]:
            with self._answer(fetch) as blocks:
                blocks.append(fs.cat_file(self._path, **place))
            return blocks

        async def ask_there() -> list[bytes]:
            with self._answer(fetch) as blocks:
                # fsspec's documented coroutine interface, in spite of its name
                blocks.append(await fs._cat_file(self._path, **place))  # noqa: SLF001
            return blocks

        if not self._concurrent:
            return partial(self._explained, partial(call_with_retries, ask, retry))
        coroutine = call_with_retries_async(ask_there, retry)
        return Pending(asyncio.run_coroutine_threadsafe(coroutine, fs.loop), self._explained)

    @contextlib.contextmanager
    def _answer(self, fetch: Fetch) -> Iterator[list[bytes]]:
        """One request, and a look at the length of what comes."""
        blocks: list[bytes] = []
        with mapped_faults("read", self.uri):
            self.requests += 1
            yield blocks
            came = sum(map(len, blocks))
            self.bytes_read += came
            if came != fetch.nbytes:
                why = ": the server ignores ranges" if came > fetch.nbytes else ""
                came_of = f"{came} of {fetch.nbytes} bytes came at offset {fetch.offset}"
                raise StorageError(f"cannot read {self.uri}: {came_of}{why}", transient=not why)

    def _explained(self, wait: Callable[[], T]) -> T:
        """Where a read fails because the object is another one now, say that instead."""
        try:
            return wait()
        except StorageError as error:
            with contextlib.suppress(StorageError):
                self.check_unchanged()
            if isinstance(error, NotFoundInStoreError):
                raise SourceChangedError(f"{self.uri} was deleted while it was read") from error
            raise

    def check_unchanged(self) -> None:
        try:
            found = self._store.stat(self._path)
        except NotFoundInStoreError as error:
            raise SourceChangedError(f"{self.uri} was deleted while it was read") from error
        refuse_other_object(self.uri, found.identity, self.identity)
