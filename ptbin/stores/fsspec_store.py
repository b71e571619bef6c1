"""Any filesystem that fsspec knows: memory, sftp, gcs, abfs, hf, http and the rest.

Owns the mapping of fsspec's loose conventions to this room's promises. Identity is the best thing that
`info()` offers (ETag, generation, checksum, unique id, else time and size). fsspec's listing caches stay
unused. `fsspec_reader` and `fsspec_writer` move the bytes.
"""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from ptbin.errors import NotFoundInStoreError, StorageError, UsageError
from ptbin.stores.base import Store, Watch
from ptbin.stores.faults import fault, mapped_faults, public_uri
from ptbin.stores.fsspec_reader import FsspecReader
from ptbin.stores.fsspec_writer import FsspecWriter
from ptbin.stores.requests import RetryPolicy, call_with_retries
from ptbin.stores.values import (
    PARTIAL_SUFFIX,
    Identity,
    ListedObject,
    ObjectStat,
    is_partial_name,
    target_of_partial,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ptbin.stores.reader import RangeReader
    from ptbin.stores.values import IdentityKind
    from ptbin.stores.writer import Writer


PUBLISH_ON_CLOSE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "tos"}
PUBLISH_ON_CLOSE |= {"mlflow-artifacts", "mlflow-artifacts+https"}
"""Protocols whose file appears only when it is closed; a rename there would be a copy and a delete."""

READ_ONLY = {"http", "https", "zip", "tar", "libarchive", "reference", "data", "git", "github", "gist"}

# Keys of fsspec's info(), the strongest first: what changes with every write, whatever the clock does.
IDENTITY_KEYS: dict[IdentityKind, tuple[str, ...]] = {
    "etag": ("ETag", "etag"),
    "version_id": ("generation",),
    "checksum": ("md5Hash", "md5", "checksum", "CRC"),  # the last is of a zip archive's member
    "uid": ("uid",),
    "mtime": ("mtime", "last_modified", "LastModified", "updated", "modified", "created"),
}


def identity_from(info: Mapping[str, Any], size: int) -> Identity:
    """The strongest identity `info` offers; sizes alone (kind "uid") where it offers nothing."""
    for kind, key in ((kind, key) for kind, keys in IDENTITY_KEYS.items() for key in keys):
        value = info.get(key)
        # sftp's and local info() call the owning user "uid": a number, and no identity.
        if value in (None, "") or (kind == "uid" and isinstance(value, int)):
            continue
        if kind == "mtime":
            return Identity(kind, f"{_moment(value)}-{size}")
        return Identity(kind, str(value).removeprefix("W/").strip('"'))
    return Identity("uid", f"size-{size}")


def _moment(value: object) -> str:
    """One spelling of a time; `info` and `ls` of one filesystem may differ (memory: datetime, float)."""
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return f"{value:.6f}" if isinstance(value, int | float) else str(value)


def _stripped(fs: Any, uri: object) -> str:
    return str(fs._strip_protocol(uri))  # noqa: SLF001 - fsspec offers no other way to turn a URL into a path


def open_fsspec(uri: str, options: Mapping[str, Any]) -> tuple[Store, str]:
    """Raises UsageError for a protocol fsspec does not know or options its filesystem does not take."""
    protocol = uri.partition(":")[0].lower()
    try:
        if "::" in uri:
            path = str(url_to_fs(uri, **options)[1])
        else:
            path = _stripped(fsspec.get_filesystem_class(protocol), uri)
    except (ValueError, ImportError, TypeError) as error:
        raise UsageError(f"cannot open {public_uri(uri)}: {error}") from error
    except Exception as error:  # an archive of a chain that is missing, or is not one
        raise fault(error, "open", uri) from error
    return FsspecStore(uri, path, options), path


T = TypeVar("T")


def _split_chain(uri: str) -> tuple[str, str, str]:
    """What stands before, in and behind the link of a chained URL that paths belong to.

    Of `simplecache::zip://a/x.pt::s3://bucket/runs.zip` that is `zip://a/x.pt`: the first with a path.
    """
    links = uri.split("::")
    own = next((at for at, link in enumerate(links) if "://" in link), len(links) - 1)
    before = "".join(f"{link}::" for link in links[:own])
    behind = "".join(f"::{link}" for link in links[own + 1 :])
    return before, links[own], behind


class FsspecStore(Store):
    """The filesystem behind one URI; connected at the first use, and again after a fork."""

    def __init__(
        self, uri: str, path: str, options: Mapping[str, Any], *, retry: RetryPolicy | None = None
    ) -> None:
        self.protocol = uri.partition(":")[0].lower()
        self.retry = retry or RetryPolicy()
        self._uri = uri
        self._options = dict(options)
        before, own, self._behind = _split_chain(uri)
        self.written_protocol = own.partition("://")[0].lower() if "://" in own else "file"
        """Of the filesystem that outputs go to, below those that only cache."""
        bare = own.rstrip("/")
        # "sftp://host/dir" holds the path "/dir": what stands before it turns a path into a URI again.
        self._prefix = before + bare[: len(bare) - len(path)] if path and bare.endswith(path) else None
        self._connected: tuple[int, Any] | None = None

    @property
    def fs(self) -> Any:
        """The fsspec filesystem of this process."""
        if self._connected is None or self._connected[0] != os.getpid():
            try:
                fs, _ = url_to_fs(self._uri, **self._options)
            except TypeError as error:
                # Not its text: some of these quote the options.
                raise UsageError(
                    f"the storage options for {public_uri(self._uri)} are not what its filesystem takes"
                ) from error
            except Exception as error:
                raise fault(error, "connect to", self._uri) from error
            self._connected = (os.getpid(), fs)
        return self._connected[1]

    def uri_of(self, path: str) -> str:
        if self._prefix is None:
            return public_uri(str(self.fs.unstrip_protocol(path)) + self._behind)
        return public_uri(self._prefix + path + self._behind)

    def _info(self, path: str) -> dict[str, Any]:
        return self._ask("read", path, lambda: self.fs.info(path))

    def _ask(self, doing: str, path: str, question: Callable[[], T]) -> T:
        """The answer as it is now, and not as a cache has it."""

        def ask() -> T:
            with mapped_faults(doing, self.uri_of(path)):
                self.fs.invalidate_cache()
                return question()

        return call_with_retries(ask, self.retry)

    def stat(self, path: str) -> ObjectStat:
        uri = self.uri_of(path)
        info = self._info(path)
        if info.get("type") == "directory":
            raise NotFoundInStoreError(f"cannot read {uri}: it is a directory, not a file")
        size = info.get("size")
        if not isinstance(size, int):
            raise StorageError(f"cannot read {uri}: the store does not tell its size")
        return ObjectStat(uri, size, identity_from(info, size))

    def is_directory(self, path: str) -> bool:
        try:
            return self._info(path).get("type") == "directory"
        except NotFoundInStoreError:
            return False

    def iter_objects(self, path: str, watch: Watch | None = None) -> Iterator[ListedObject]:
        """One `ls` for each directory, by name; memory: the directories between the root and here."""
        watch = watch or Watch()
        root = path.rstrip("/")
        pending = [iter(self._entries(path))]
        while pending:
            info = next(pending[-1], None)
            if info is None:
                pending.pop()
                continue
            name = self._name(info)
            relative = name[len(root) :].lstrip("/")
            if info["type"] == "directory":
                if watch.enters(relative):
                    pending.append(iter(self._entries_below(name, relative, watch)))
                continue
            if is_partial_name(name):
                continue
            if info["type"] == "link" or not isinstance(info.get("size"), int):
                try:
                    found = self.stat(name)
                except NotFoundInStoreError:
                    if info["type"] == "link":  # leads nowhere or to a directory; else deleted meanwhile
                        watch.passes(relative, "dangling_link")
                    continue
                size, identity = found.size, found.identity
            else:
                size, identity = info["size"], identity_from(info, info["size"])
            yield ListedObject(relative, self.uri_of(name), size, identity)

    def _entries_below(self, directory: str, relative: str, watch: Watch) -> list[dict[str, Any]]:
        try:
            return self._entries(directory)
        except StorageError as error:
            if error.transient:
                raise
            watch.cannot_read(relative, error)
            return []

    def _entries(self, directory: str) -> list[dict[str, Any]]:
        try:
            listed = self._ask("list", directory, lambda: self.fs.ls(directory, detail=True))
        except NotFoundInStoreError:
            return []
        bare = directory.rstrip("/")
        # Object stores list a directory's marker object, and a file as its own only entry.
        return sorted((info for info in listed if self._name(info) != bare), key=self._name)

    def _name(self, info: Mapping[str, Any]) -> str:
        return _stripped(self.fs, info["name"]).rstrip("/")

    def open_reader(self, path: str, *, expected: Identity | None = None) -> RangeReader:
        return FsspecReader(self, path, self.stat(path)).expecting(expected)

    def open_writer(
        self, path: str, *, size_hint: int | None = None, copies: bool = True, claim: str = ""
    ) -> Writer:
        del size_hint, copies, claim
        protocol = self.written_protocol
        return FsspecWriter(
            self.fs,
            path,
            self.uri_of(path),
            publishes_on_close=protocol in PUBLISH_ON_CLOSE,
            has_directories=protocol not in PUBLISH_ON_CLOSE | {"memory"},
        )

    def delete(self, path: str) -> None:
        with contextlib.suppress(NotFoundInStoreError), mapped_faults("delete", self.uri_of(path)):
            self.fs.rm_file(path)

    def discard_unfinished(self, path: str, is_ours: Callable[[str], bool]) -> int:
        root, count = path.rstrip("/"), 0
        for found in self._ask("list", path, lambda: self.fs.find(root)):
            name = _stripped(self.fs, found)
            if is_partial_name(name) and is_ours(target_of_partial(name[len(root) :].lstrip("/"))):
                self.delete(name)
                count += 1
        return count

    def check_writable(self, path: str) -> None:
        """Write and delete an empty object whose name no listing shows: there is no cheaper sure way.

        Where directories are real, in the nearest one that exists.
        """
        if self.written_protocol in READ_ONLY:
            uri = self.uri_of(path)
            raise StorageError(f"cannot write to {uri}: what lies at {self.written_protocol}:// is only read")
        folder = path.rstrip("/")
        with contextlib.suppress(StorageError):
            if self._info(path).get("type") == "file":
                folder = folder.rpartition("/")[0]
        if self.written_protocol not in PUBLISH_ON_CLOSE:
            while folder.strip("/") and not self.is_directory(folder):
                folder = folder.rpartition("/")[0]
        probe = f"{folder}/.check.{os.urandom(6).hex()}{PARTIAL_SUFFIX}"
        with mapped_faults("write to", self.uri_of(path)):
            self.fs.pipe_file(probe, b"")
            self.fs.rm_file(probe)
