"""The two ends of every transfer, and the store that opens them, as abstract classes and frozen values.

Owns what a store promises: a reader is *pinned* (each byte it hands out belongs to the object that was
seen first, or it raises `SourceChangedError`), a writer is *whole or nothing* (before `commit` nobody
can see a byte under the final name, after `abort` nothing remains). Knows neither a backend nor what
the bytes mean. A path is what a store calls an object ("bucket/key", "/data/x.bin"); a URI is what a
user writes and what manifests and messages carry, so it never holds a password.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ptbin.errors import StorageError
from ptbin.stores.values import READ_BYTES_LIMIT, refuse_too_large

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ptbin.stores.reader import RangeReader
    from ptbin.stores.values import Identity, ListedObject, ObjectStat
    from ptbin.stores.writer import Writer

PassedOver = Literal["special_file", "dangling_link", "outside_link"]
"""Pipes, sockets and devices; links that lead nowhere, or out of the listed place and are not followed."""


class Watch:
    """What a listing asks about folders, links and what is not a file. Paths are relative.

    Only stores that have such things ask. This one goes everywhere, follows every link, and raises where a
    folder cannot be read; `catalog.entries` has the rule for SOURCE.
    """

    def enters(self, folder: str) -> bool:
        """Whether the listing goes into `folder`."""
        del folder
        return True

    def follows(self, link: str, target: str) -> bool:
        """Whether a link is followed that leads out of the listed place, to `target`."""
        del link, target
        return True

    def passes(self, path: str, kind: PassedOver) -> None:
        """An entry is passed over."""

    def cannot_read(self, path: str, error: StorageError) -> None:
        """A folder, or an entry of one, cannot be looked at; the listing goes on where this returns."""
        del path
        raise error


class WatchQuietly(Watch):
    """Passes over what cannot be read."""

    def cannot_read(self, path: str, error: StorageError) -> None:
        """Nothing is raised."""


class Store(ABC):
    """One place that holds objects by path. Every error it raises is one of `ptbin.errors`."""

    protocol: str
    storage_options: Mapping[str, Any] = MappingProxyType({})
    """What it was made of, in other processes as well; never shown."""
    carries_claims: ClassVar[bool] = False
    """Whether an object can carry a word about itself, which goes when something else is written there."""

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
    def iter_objects(self, path: str, watch: Watch | None = None) -> Iterator[ListedObject]:
        """Everything below `path`, lazily and never from a cache; nothing where there is no such prefix.

        Unfinished outputs are passed over. `watch` says what becomes of folders that cannot be read, of links
        that lead elsewhere and of what is not a file.

        Raises:
            NotFoundInStoreError: the bucket is missing.
        """

    @abstractmethod
    def open_reader(self, path: str, *, expected: Identity | None = None) -> RangeReader:
        """Pin the object. Raises SourceChangedError where its identity is not `expected`."""

    def look(self, path: str) -> ObjectStat:
        """As `stat`, of an object that is about to be read: its store may bring some of it along."""
        return self.stat(path)

    def open_found(self, path: str, found: ObjectStat) -> RangeReader:
        """A reader of what `look` has found, by no more requests than are needed for that."""
        return self.open_reader(path, expected=found.identity)

    @abstractmethod
    def open_writer(
        self, path: str, *, size_hint: int | None = None, copies: bool = True, claim: str = ""
    ) -> Writer:
        """Begin an output; `size_hint` (bytes to come) lets a store choose its part size.

        `copies` false: everything is to come through `write`. `claim`: what the object is to carry, where the
        store has a place for it (`carries_claims`).
        """

    def claim_of(self, path: str) -> str:
        """What the object at `path` carries; empty where that is nothing, or there is no object."""
        del path
        return ""

    def crc32_of(self, path: str) -> int | None:
        """The CRC-32 of a whole object, computed by the store from what it keeps; None: it has none."""
        del path
        return None

    @abstractmethod
    def delete(self, path: str) -> None:
        """See that nothing is at `path`; no error where nothing was."""

    def discard_unfinished(self, path: str, is_ours: Callable[[str], bool]) -> int:
        """Remove what writers that were killed left below `path`; how many that were.

        Only for whoever knows that no writer is at work there. `is_ours` is asked with the path below `path`
        that the output was to have.
        """
        del path, is_ours
        return 0

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
        return self.read_identified(path, limit=limit)[0]

    def read_identified(self, path: str, *, limit: int = READ_BYTES_LIMIT) -> tuple[bytes, Identity]:
        """A whole small object, and which state of it that is; errors as `read_bytes`."""
        with self.open_reader(path) as reader:
            refuse_too_large(reader.uri, reader.size, limit)
            return reader.read(0, reader.size), reader.identity

    def write_bytes(
        self, path: str, data: bytes, *, claim: str = "", lasting: bool = True
    ) -> Identity | None:
        """Write a whole small object, or nothing; its identity where the store tells it by itself.

        `lasting`: it must outlast a power failure. A store that has no cheaper way ignores it.
        """
        del lasting
        with self.open_writer(path, size_hint=len(data), claim=claim) as writer:
            writer.write(data)
            writer.commit()
            return writer.identity
