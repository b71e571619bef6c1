"""A place: a store and a path in it, made of a text once, at the edge.

    dest = place_of("s3://models/weights", {"anon": True})
    manifest = (dest / "run1" / "last.bin").beside(".manifest.json")

Below the edge no path is joined or cut by hand, and no URI travels with its storage options beside it. What
a path means is the store's business: on object stores `x.pt` and `x.pt/` are two things, and a key may hold
`//`. Making a place asks nothing of the store. Its text never shows options or passwords.

Local paths need neither fsspec nor a network library; those are imported when the first URI asks for them,
because a small local conversion must start at once.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ptbin.errors import UsageError
from ptbin.installed import require
from ptbin.stores.faults import refuse_secret
from ptbin.stores.values import READ_BYTES_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ptbin.stores.base import Store, Watch
    from ptbin.stores.reader import RangeReader
    from ptbin.stores.values import Identity, ListedObject, ObjectStat
    from ptbin.stores.writer import Writer

    StoreFactory = Callable[[str, Mapping[str, Any]], tuple[Store, str]]

Where: TypeAlias = "str | os.PathLike[str] | Place"
"""What public functions take for a place."""

# RFC 3986 schemes, and fsspec's chains ("simplecache::s3://...").
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(?:://|::)")

_factories: dict[str, StoreFactory] = {}


@dataclass(frozen=True, slots=True, repr=False)
class Place:
    """`path` as `store` calls it; a slash at its end says "what lies below"."""

    store: Store = field(compare=False)
    path: str

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"Place({self.uri!r})"

    # -- names -----------------------------------------------------------------------------------

    @property
    def uri(self) -> str:
        """Fit for manifests and messages; `place_of` of it, with the same options, is this place again."""
        return self.store.uri_of(self.path)

    @property
    def name(self) -> str:
        """The last part; empty for a root."""
        return self._bare.rpartition("/")[2]

    @property
    def parent(self) -> Place:
        """The folder that this lies in; of a root, the root."""
        folder, slash, _ = self._bare.rpartition("/")
        if not self._bare:
            return self
        # Of a key with `//` in it the folder's own path ends with a slash.
        return Place(self.store, folder + slash if not folder or folder.endswith("/") else folder)

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine."""
        return self.store.protocol == "file"

    @property
    def file(self) -> Place:
        """The same without a slash at its end."""
        return Place(self.store, self._bare or self.path)

    def __truediv__(self, path: str) -> Place:
        """What lies at `path` ('/'-separated) below this."""
        between = "" if not self.path or self.path.endswith("/") else "/"
        return Place(self.store, f"{self.path}{between}{path}")

    def beside(self, suffix: str) -> Place:
        """The file next to this one whose name has `suffix` behind it."""
        return Place(self.store, (self._bare or self.path) + suffix)

    def without(self, suffix: str) -> Place:
        """The file whose name this has without `suffix` at its end; this one where it is not there."""
        return Place(self.store, self.path.removesuffix(suffix))

    def relative_to(self, folder: Place) -> str:
        """The path below `folder`. Raises ValueError where this does not lie there."""
        prefix = folder.path if not folder.path or folder.path.endswith("/") else f"{folder.path}/"
        if not self.path.startswith(prefix):
            raise ValueError(f"{self.uri} does not lie below {folder.uri}")
        return self.path[len(prefix) :]

    @property
    def _bare(self) -> str:
        return self.path.rstrip("/")

    # -- what the store's methods of these names do -----------------------------------------------

    def stat(self) -> ObjectStat:
        return self.store.stat(self.path)

    def look(self) -> ObjectStat:
        return self.store.look(self.path)

    def is_directory(self) -> bool:
        return self.store.is_directory(self.path)

    def iter_objects(self, watch: Watch | None = None) -> Iterator[ListedObject]:
        return self.store.iter_objects(self.path, watch)

    def open_reader(self, *, expected: Identity | None = None) -> RangeReader:
        return self.store.open_reader(self.path, expected=expected)

    def open_found(self, found: ObjectStat) -> RangeReader:
        return self.store.open_found(self.path, found)

    def open_writer(self, *, size_hint: int | None = None, copies: bool = True, claim: str = "") -> Writer:
        return self.store.open_writer(self.path, size_hint=size_hint, copies=copies, claim=claim)

    def read_bytes(self, *, limit: int = READ_BYTES_LIMIT) -> bytes:
        return self.store.read_bytes(self.path, limit=limit)

    def read_identified(self, *, limit: int = READ_BYTES_LIMIT) -> tuple[bytes, Identity]:
        return self.store.read_identified(self.path, limit=limit)

    def write_bytes(self, data: bytes, *, claim: str = "", lasting: bool = True) -> Identity | None:
        return self.store.write_bytes(self.path, data, claim=claim, lasting=lasting)

    def delete(self) -> None:
        self.store.delete(self.path)

    def check_writable(self) -> None:
        self.store.check_writable(self.path)


def place_of(where: Where, storage_options: Mapping[str, Any] | None = None) -> Place:
    """The place that a text means.

    Args:
        where: a place, which stays itself, or as `open_store`.
        storage_options: as `open_store`.

    Raises:
        UsageError: as `open_store`, or options for a place, which has its own.
    """
    if isinstance(where, Place):
        if storage_options:
            raise UsageError(f"{where.uri} is a place and has storage options already; others were given")
        return where
    text = os.fspath(where)
    if not isinstance(text, str):
        raise TypeError("a place is text, a path or a Place, and not bytes; os.fsdecode makes text of them")
    return Place(*open_store(text, storage_options))


def open_store(uri: str, storage_options: Mapping[str, Any] | None = None) -> tuple[Store, str]:
    """The store that `uri` lies in, and its path there.

    Args:
        uri: a local path ("x/y", "/x/y", "~/x", "file:///x/y"), or any URL fsspec knows.
        storage_options: what fsspec's filesystem of that kind takes; never logged, never in messages.

    Raises:
        UsageError: an empty URI, an unknown protocol, or options the filesystem does not take.
    """
    if not uri:
        raise UsageError("an empty path or URI was given")
    options = storage_options or {}
    match = _PROTOCOL.match(uri)
    protocol = match.group(1).lower() if match else "file"
    store, path = (_factories.get(protocol) or _factory_of(protocol))(uri, options)
    store.storage_options = options
    return store, path


def _factory_of(protocol: str) -> StoreFactory:
    if protocol in ("file", "local"):
        from ptbin.stores.local import open_local

        return open_local
    if protocol in ("s3", "s3a"):
        require("s3fs", f"{protocol}://")
        from ptbin.stores.s3 import open_s3

        return open_s3
    from ptbin.stores.fsspec_store import open_fsspec

    return open_fsspec


def register_store(protocol: str, factory: StoreFactory | None) -> None:
    """Let `factory(uri, storage_options)` open the URIs of `protocol` ("file": also plain paths).

    None takes a registration back. For stores of one's own, and for tests that count, slow or break one.
    """
    if factory is None:
        _factories.pop(protocol, None)
    else:
        _factories[protocol] = factory


def apart(where: Where, storage_options: Mapping[str, Any] | None) -> tuple[str, Mapping[str, Any] | None]:
    """A place's URI and options, as whole runs keep them: their jobs and records hold texts.

    Raises:
        UsageError: a URI with a password in it, which nothing made of that text would have any more.
    """
    if isinstance(where, Place):
        place = place_of(where, storage_options)
        return place.uri, place.store.storage_options
    refuse_secret(text := os.fspath(where))
    return text, storage_options


@dataclass(frozen=True, slots=True)
class Sides:
    """The storage options of a run's two ends. Makes places of the URIs that jobs, records and batches carry.

    Crosses to other processes in place of places; its `repr` shows nothing. A place stays what it is.
    """

    source_options: Mapping[str, Any] | None = field(default=None, repr=False)
    dest_options: Mapping[str, Any] | None = field(default=None, repr=False)

    def source_at(self, where: Where) -> Place:
        return where if isinstance(where, Place) else place_of(where, self.source_options)

    def dest_at(self, where: Where) -> Place:
        return where if isinstance(where, Place) else place_of(where, self.dest_options)


NO_OPTIONS = Sides()
