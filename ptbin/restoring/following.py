"""SHA-256 of a file while another process writes it: the one serial lane ends soon after the writer.

The file is read chunk by chunk as it grows. Should the writer go back and change what was read already (torch
does not), the CRC-32 of what was read is not the finished file's: the caller then hashes it anew.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable

from ptbin.values.crc32 import crc32_of

CHUNK_NBYTES = 4 << 20
PAUSE_SECONDS = 0.005


class FollowedFile:
    """A thread that reads behind the writer, until `complete`; `close` gives up."""

    def __init__(self, descriptor: int, arrived: Callable[[int], None]) -> None:
        """`arrived` is called with each position that was reached, on that thread."""
        self._descriptor = descriptor
        self._arrived = arrived
        self._whole = hashlib.sha256()
        self._complete = threading.Event()
        self._given_up = False
        self._fault: Exception | None = None
        self.crc32 = 0
        self._thread = threading.Thread(target=self._run, name="ptbin-follow", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._read()
        except Exception as error:  # noqa: BLE001 - raised where the digest is asked for
            self._fault = error

    def _read(self) -> None:
        buffer = memoryview(bytearray(CHUNK_NBYTES))
        position = 0
        while not self._given_up:
            complete = self._complete.is_set()
            nbytes = os.preadv(self._descriptor, [buffer], position)
            if nbytes:
                self._whole.update(buffer[:nbytes])
                self.crc32 = crc32_of(buffer[:nbytes], self.crc32)
                position += nbytes
                self._arrived(position)
            elif complete:
                return
            else:
                self._complete.wait(PAUSE_SECONDS)

    def complete(self) -> None:
        """The writer is done."""
        self._complete.set()

    def sha256(self) -> str:
        """Of all that was read, after `complete`. Raises what reading raised."""
        self._thread.join()
        if self._fault is not None:
            raise self._fault
        return self._whole.hexdigest()

    def close(self) -> None:
        self._given_up = True
        self._complete.set()
        self._thread.join()


def sha256_of(descriptor: int) -> str:
    """SHA-256 of an open file from its beginning."""
    digest, position = hashlib.sha256(), 0
    while piece := os.pread(descriptor, CHUNK_NBYTES, position):
        digest.update(piece)
        position += len(piece)
    return digest.hexdigest()
