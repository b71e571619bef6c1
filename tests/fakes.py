"""Stores that count, fail on schedule, or are slow, around any real one.

All three are one wrapper with one hook: `before(call)` comes first, on the caller's thread, for every
operation: "stat", "list", "open", "read", "check", "create", "write", "copy", "commit", "delete",
"is_directory", "check_writable". They nest, and `registered` puts one behind a protocol of its own, so
that code which only knows URIs meets it:

    with registered("counted", CountingStore(LocalStore())) as store:
        ptbin.convert("counted:///data/x.pt", "/out/x.bin")
    assert store.count("read") == 3
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ptbin.stores import RangeReader, Store, Writer, register_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ptbin.stores import Identity, ListedObject, ObjectStat, Watch

StoreT = TypeVar("StoreT", bound="Store")

__all__ = ["Call", "CountingStore", "FaultyStore", "HookedStore", "SlowStore", "registered"]


@dataclass(frozen=True, slots=True)
class Call:
    """One operation; `offset` and `nbytes` for "read", "copy" and "write", else None."""

    operation: str
    path: str
    offset: int | None = None
    nbytes: int | None = None


class HookedStore(Store):
    """Passes everything on to `inner`, after `before`."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.protocol = inner.protocol
        self.uri_prefix = ""

    def before(self, call: Call) -> None:
        """For subclasses."""

    def uri_of(self, path: str) -> str:
        return self.uri_prefix + self.inner.uri_of(path)

    def stat(self, path: str) -> ObjectStat:
        self.before(Call("stat", path))
        return self.inner.stat(path)

    def is_directory(self, path: str) -> bool:
        self.before(Call("is_directory", path))
        return self.inner.is_directory(path)

    def iter_objects(self, path: str, watch: Watch | None = None) -> Iterator[ListedObject]:
        self.before(Call("list", path))
        return self.inner.iter_objects(path, watch)

    def open_reader(self, path: str, *, expected: Identity | None = None) -> RangeReader:
        self.before(Call("open", path))
        return HookedReader(self, path, self.inner.open_reader(path, expected=expected))

    def open_writer(
        self, path: str, *, size_hint: int | None = None, copies: bool = True, claim: str = ""
    ) -> Writer:
        self.before(Call("create", path))
        return HookedWriter(
            self, path, self.inner.open_writer(path, size_hint=size_hint, copies=copies, claim=claim)
        )

    def delete(self, path: str) -> None:
        self.before(Call("delete", path))
        self.inner.delete(path)

    def check_writable(self, path: str) -> None:
        self.before(Call("check_writable", path))
        self.inner.check_writable(path)


class HookedReader(RangeReader):
    """Has no descriptor, so that every byte comes through `read`, where the hook sees it."""

    def __init__(self, store: HookedStore, path: str, inner: RangeReader) -> None:
        super().__init__(inner.uri, inner.size, inner.identity)
        self._store = store
        self._path = path
        self._inner = inner
        self.gap_nbytes = inner.gap_nbytes  # type: ignore[misc]  # as the store behind it plans
        self.best_chunk_nbytes = inner.best_chunk_nbytes  # type: ignore[misc]

    def _read(self, offset: int, nbytes: int) -> bytes:
        self._store.before(Call("read", self._path, offset, nbytes))
        data = self._inner.read(offset, nbytes)
        self.requests, self.bytes_read = self._inner.requests, self._inner.bytes_read
        return data

    def check_unchanged(self) -> None:
        self._store.before(Call("check", self._path))
        self._inner.check_unchanged()

    def close(self) -> None:
        self._inner.close()


class HookedWriter(Writer):
    def __init__(self, store: HookedStore, path: str, inner: Writer) -> None:
        super().__init__(inner.uri)
        self._store = store
        self._path = path
        self._inner = inner

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._store.before(Call("write", self._path, self.bytes_written, memoryview(data).nbytes))
        self._inner.write(data)
        self.bytes_written = self._inner.bytes_written

    def copy_from(self, reader: RangeReader, offset: int, nbytes: int) -> bool:
        self._store.before(Call("copy", self._path, offset, nbytes))
        moved = self._inner.copy_from(reader, offset, nbytes)
        self.bytes_written = self._inner.bytes_written
        return moved

    def _publish(self) -> None:
        self._store.before(Call("commit", self._path))
        self._inner.commit()

    def _discard(self) -> None:
        self._inner.abort()


class CountingStore(HookedStore):
    """Remembers every call."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.calls: list[Call] = []

    def before(self, call: Call) -> None:
        self.calls.append(call)

    def count(self, operation: str, path_end: str = "") -> int:
        return sum(call.operation == operation and call.path.endswith(path_end) for call in self.calls)

    def nbytes(self, operation: str, path_end: str = "") -> int:
        return sum(
            call.nbytes or 0
            for call in self.calls
            if call.operation == operation and call.path.endswith(path_end)
        )


class FaultyStore(HookedStore):
    """Raises by schedule: {"read": [None, error]} lets the first read pass and fails the second one.

    A callable in the schedule is called instead (to overwrite the source between two reads, say).
    After its schedule an operation works; `struck` counts the faults that came up.
    """

    def __init__(
        self, inner: Store, schedule: Mapping[str, Sequence[BaseException | Callable[[], object] | None]]
    ) -> None:
        super().__init__(inner)
        self._schedule = {operation: iter(faults) for operation, faults in schedule.items()}
        self.struck: Counter[str] = Counter()

    def before(self, call: Call) -> None:
        fault = next(self._schedule.get(call.operation, iter(())), None)
        if fault is None:
            return
        self.struck[call.operation] += 1
        if isinstance(fault, BaseException):
            raise fault
        fault()


class SlowStore(HookedStore):
    """Waits before each of `operations` (None: all), as a store behind a long line does."""

    def __init__(self, inner: Store, delay_s: float, operations: Sequence[str] | None = None) -> None:
        super().__init__(inner)
        self._delay_s = delay_s
        self._operations = operations

    def before(self, call: Call) -> None:
        if self._operations is None or call.operation in self._operations:
            time.sleep(self._delay_s)


@contextlib.contextmanager
def registered(protocol: str, store: StoreT) -> Iterator[StoreT]:
    """`protocol://path` means `path` in `store` (for a local store: `protocol:///absolute/path`)."""

    def factory(uri: str, storage_options: Mapping[str, Any]) -> tuple[Store, str]:
        return store, uri.removeprefix(f"{protocol}://")

    if isinstance(store, HookedStore):
        store.uri_prefix = f"{protocol}://"
    register_store(protocol, factory)
    try:
        yield store
    finally:
        register_store(protocol, None)
