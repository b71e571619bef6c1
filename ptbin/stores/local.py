"""Files on a mounted filesystem, without fsspec: this path decides how fast a small conversion starts.

Owns descriptors, directory walks and what identifies a file: size and modification time in
nanoseconds. The inode stays out, so that a tree put back with `cp -p` counts as unchanged; within one
reader the open descriptor pins the content. Not detected: a writer that sets the old time again, or
one that rewrites bytes in place within the clock tick (some milliseconds) of the first look.
"""

from __future__ import annotations

import errno
import os
import re
import stat as stat_module
from typing import TYPE_CHECKING, Any

from ptbin.errors import (
    AccessDeniedError,
    CorruptArchiveError,
    NotFoundInStoreError,
    StorageError,
    UsageError,
)
from ptbin.stores.base import Store, Watch
from ptbin.stores.faults import fault, mapped_faults
from ptbin.stores.local_writer import LocalWriter, identity_of, open_unpublished
from ptbin.stores.reader import RangeReader
from ptbin.stores.values import (
    MIB,
    PARTIAL_SUFFIX,
    Identity,
    ListedObject,
    ObjectStat,
    is_partial_name,
    refuse_other_object,
    target_of_partial,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


def open_local(uri: str, options: Mapping[str, Any]) -> tuple[Store, str]:
    """Of a path, or a URL; the path comes out absolute.

    Raises:
        UsageError: it is relative, and the working folder was deleted.
    """
    del options
    path = re.sub(r"(?i)^(?:file|local):(?://|:)", "", uri)
    try:
        return LocalStore(), os.path.abspath(os.path.expanduser(path))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: the working folder is gone; go to another, or give whole paths") from error


class LocalStore(Store):
    """The filesystem of this machine; a path is an absolute path, and so is a URI."""

    protocol = "file"

    def uri_of(self, path: str) -> str:
        return path

    def stat(self, path: str) -> ObjectStat:
        with mapped_faults("read", path):
            status = os.stat(path)
        _refuse_irregular(path, status)
        return ObjectStat(path, status.st_size, identity_of(status))

    def is_directory(self, path: str) -> bool:
        try:
            return stat_module.S_ISDIR(os.stat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise fault(error, "read", path) from error

    def iter_objects(self, path: str, watch: Watch | None = None) -> Iterator[ListedObject]:
        """Depth first, by name. Symbolic links are followed, but never back into a directory above.

        Broken links, files that vanish meanwhile, pipes and devices are passed over. Unless `watch` says
        otherwise, a directory that may not be read raises AccessDeniedError: passing it over would hide
        checkpoints.
        """
        if not os.path.isdir(path):
            return
        watch = watch or Watch()
        with mapped_faults("list", path):
            root = os.stat(path)
        real_root = os.path.join(os.path.realpath(path), "")
        cut = len(os.path.join(path, ""))
        pending: list[tuple[Iterator[os.DirEntry[str]], tuple[int, int]]] = []
        above: set[tuple[int, int]] = set()

        def enter(directory: str, status: os.stat_result) -> None:
            key = (status.st_dev, status.st_ino)
            if key not in above:
                try:
                    pending.append((_sorted_entries(directory), key))
                except StorageError as error:
                    if directory == path:
                        raise
                    watch.cannot_read(directory[cut:], error)
                    return
                above.add(key)

        enter(path, root)
        while pending:
            entries, key = pending[-1]
            entry = next(entries, None)
            if entry is None:
                pending.pop()
                above.discard(key)
                continue
            relative = entry.path[cut:]
            try:
                status = entry.stat()
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP):
                    if entry.is_symlink():
                        watch.passes(relative, "dangling_link")
                    continue
                failed = fault(error, "list", entry.path)
                if not isinstance(failed, StorageError):
                    raise failed from error
                if isinstance(failed, AccessDeniedError) and not entry.is_symlink() and len(pending) > 1:
                    # A folder that shows its names and nothing else: all the others would answer the same.
                    relative = os.path.dirname(relative)
                    above.discard(pending.pop()[1])
                watch.cannot_read(relative, failed)
                continue
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not os.path.join(target, "").startswith(real_root) and not watch.follows(relative, target):
                    watch.passes(relative, "outside_link")
                    continue
            if stat_module.S_ISDIR(status.st_mode):
                if watch.enters(relative):
                    enter(entry.path, status)
            elif not stat_module.S_ISREG(status.st_mode):
                watch.passes(relative, "special_file")
            elif not is_partial_name(entry.name):
                yield ListedObject(relative, entry.path, status.st_size, identity_of(status))

    def open_reader(self, path: str, *, expected: Identity | None = None) -> LocalReader:
        return LocalReader(path).expecting(expected)

    def open_writer(
        self, path: str, *, size_hint: int | None = None, copies: bool = True, claim: str = ""
    ) -> LocalWriter:
        del copies, claim  # a local file's always could
        return LocalWriter(path, size_hint)

    def write_bytes(self, path: str, data: bytes, *, claim: str = "", lasting: bool = True) -> Identity:
        del claim
        with LocalWriter(path, len(data), flushes=lasting) as writer:
            writer.write(data)
            writer.commit()
        assert writer.identity is not None
        return writer.identity

    def delete(self, path: str) -> None:
        try:
            with mapped_faults("delete", path):
                os.unlink(path)
        except NotFoundInStoreError:
            if os.path.isdir(path):
                raise

    def discard_unfinished(self, path: str, is_ours: Callable[[str], bool]) -> int:
        """Only where the file system has no unnamed files is anything left of a killed writer."""
        count = 0
        for directory, _, names in os.walk(path):
            for name in names:
                found = os.path.join(directory, name)
                if is_partial_name(name) and is_ours(target_of_partial(os.path.relpath(found, path))):
                    self.delete(found)
                    count += 1
        return count

    def check_writable(self, path: str) -> None:
        """Make and drop an empty unnamed file in the nearest directory that exists."""
        directory = path
        while not os.path.isdir(directory):
            if os.path.lexists(directory) and directory != path:
                raise StorageError(f"cannot write below {path}: {directory} is not a directory")
            directory = os.path.dirname(directory)
        with mapped_faults("write to", directory):
            descriptor, name = open_unpublished(os.path.join(directory, "check" + PARTIAL_SUFFIX))
            os.close(descriptor)
            if name is not None:
                os.unlink(name)


def _sorted_entries(directory: str) -> Iterator[os.DirEntry[str]]:
    with mapped_faults("list", directory), os.scandir(directory) as entries:
        return iter(sorted(entries, key=lambda entry: entry.name))


def _refuse_irregular(path: str, status: os.stat_result) -> None:
    if stat_module.S_ISDIR(status.st_mode):
        raise NotFoundInStoreError(f"cannot read {path}: it is a directory, not a file")
    if not stat_module.S_ISREG(status.st_mode):
        raise StorageError(f"cannot read {path}: it is a pipe, socket or device, not a regular file")


class LocalReader(RangeReader):
    """One open descriptor, read by `pread`: no seek position, no buffer, no read-ahead of its own."""

    is_shareable = True
    # Large enough to hide Python's cost per call, small enough to stay in the processor's cache.
    best_chunk_nbytes = 1 * MIB

    def __init__(self, path: str) -> None:
        with mapped_faults("read", path):
            # Opening a pipe or a device may block or act; so look before, and again at what was opened.
            _refuse_irregular(path, os.stat(path))
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            with mapped_faults("read", path):
                status = os.fstat(self._descriptor)
            _refuse_irregular(path, status)
        except BaseException:
            self.close()
            raise
        self._path = path
        super().__init__(path, status.st_size, identity_of(status))

    def _read(self, offset: int, nbytes: int) -> bytes:
        self.requests += 1
        with mapped_faults("read", self.uri):
            data = piece = os.pread(self._descriptor, nbytes, offset)
            while piece and len(data) < nbytes:  # Linux moves at most 0x7ffff000 bytes a call (man 2 read)
                piece = os.pread(self._descriptor, nbytes - len(data), offset + len(data))
                data += piece
        self.bytes_read += len(data)
        if len(data) < nbytes:
            refuse_other_object(self.uri, identity_of(os.fstat(self._descriptor)), self.identity)
            raise CorruptArchiveError(
                f"{self.uri} gives {len(data)} of {nbytes} bytes at offset {offset}, "
                f"although it is {self.size} long"
            )
        return data

    def check_unchanged(self) -> None:
        with mapped_faults("read", self.uri):
            opened = identity_of(os.fstat(self._descriptor))
            try:
                named = identity_of(os.stat(self._path))
            except FileNotFoundError:
                named = Identity("mtime", "deleted")
        refuse_other_object(self.uri, opened, self.identity)
        refuse_other_object(self.uri, named, self.identity)

    def fileno(self) -> int | None:
        return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
