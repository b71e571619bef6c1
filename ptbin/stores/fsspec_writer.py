"""Writing through fsspec's file objects, so that the final name appears whole or not at all.

Object stores, whose `open(..., "wb")` publishes at the end, are written in place and discarded on failure;
others get a temporary name that is moved over the final one. That move is as atomic as the backend's.
"""

from __future__ import annotations

import contextlib
from typing import Any

import fsspec

from ptbin.errors import StorageError
from ptbin.stores.faults import mapped_faults
from ptbin.stores.values import MIB, partial_name
from ptbin.stores.writer import Writer


class FsspecWriter(Writer):
    """A file object of the filesystem, under a temporary name unless it appears only when it is closed."""

    def __init__(
        self, fs: Any, path: str, uri: str, *, publishes_on_close: bool, has_directories: bool
    ) -> None:
        super().__init__(uri)
        self._fs = fs
        self._final = path
        self._in_place = publishes_on_close
        self._path = path if self._in_place else partial_name(path)
        self._file: Any = None
        with mapped_faults("write", self.uri):
            if not self._in_place and fs.isdir(path):
                raise StorageError(f"cannot write {self.uri}: it is a directory")
            if has_directories:
                fs.makedirs(path.rpartition("/")[0] or "/", exist_ok=True)
            self._file = fs.open(self._path, "wb", block_size=8 * MIB)
            if hasattr(self._file, "set_pipelined"):  # paramiko's waits for an answer each 32 KiB else
                self._file.set_pipelined(True)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        with mapped_faults("write", self.uri):
            rest = memoryview(data).cast("B")
            while rest:
                taken = self._file.write(rest)
                taken = len(rest) if taken is None else taken  # some file objects do not say
                self.bytes_written += taken
                rest = rest[taken:]

    def _publish(self) -> None:
        with mapped_faults("write", self.uri):
            self._file.close()
            self._fs.invalidate_cache()
            stored = self._fs.info(self._path)["size"]
            if stored != self.bytes_written:
                raise StorageError(
                    f"cannot write {self.uri}: {self.bytes_written} bytes were written, {stored} are stored",
                    transient=True,
                )
            if not self._in_place:
                _move(self._fs, self._path, self._final)

    def _discard(self) -> None:
        with contextlib.suppress(Exception):
            if self._in_place:
                if hasattr(self._file, "discard"):
                    self._file.discard()
                self._file.closed = True  # else the garbage collector would close, and so publish it
            else:
                self._file.close()
        if not self._in_place:
            with contextlib.suppress(Exception):
                self._fs.rm_file(self._path)


def _move(fs: Any, source: str, target: str) -> None:
    """By the filesystem's rename; its default one would read `*` and `[` in names as patterns."""
    if type(fs).mv is fsspec.AbstractFileSystem.mv:
        fs.cp_file(source, target)
        fs.rm_file(source)
        return
    try:
        fs.mv(source, target)
    except OSError:
        if not fs.exists(target):  # some refuse to rename over a file (FTP, WebHDFS)
            raise
        fs.rm_file(target)
        fs.mv(source, target)
