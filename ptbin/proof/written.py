"""Proof of a local file before it gets its name: its bytes, read back, are what the source states.

Where this process works on fewer files than it has cores, a large one is hashed on all of them, from the
moment its first bytes are there (`growing.py`). Where the files at work keep the cores busy, each is hashed
by the thread that writes it, step by step, while the bytes still lie in that core's cache: nothing is handed
over, and each byte is read once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ptbin.cores import available_cores, hashing_slot, is_crowded
from ptbin.errors import VerificationError
from ptbin.proof.digests import OnePass, digest_descriptor
from ptbin.proof.growing import GrowingFile
from ptbin.proof.local_file import LocalFile
from ptbin.proof.output import compare_checksums
from ptbin.proof.serial import Serial
from ptbin.values.digests import FileDigests, StoredTensor

if TYPE_CHECKING:
    from ptbin.manifests.draft import DraftFile
    from ptbin.values.segments import Plan

SMALL_NBYTES = 1 << 20
"""Files up to this size are hashed when they are written: threads would take longer to begin."""
FOLLOWED_NBYTES = 32 << 20
"""Files at least this large are hashed while they are being written."""
HUGE_NBYTES = 1 << 30
"""Files at least this large are hashed on all cores however many others there are: one thread would still be
hashing when those are done.
"""


STEP_NBYTES = 8 << 20
ALL_STEPS_NBYTES = 128 << 20
"""What is read and hashed at a time by a thread that writes, and by all of them. Each step waits for the
interpreter's lock five times, for which the threads of 16 files queue.
"""


class WrittenProof:
    """Either `finish` or `give_up` must be called before the descriptor is closed.

    Args:
        plan: the file's bytes, with the place of each record.
        tensors: names, and where they lie in it.
    """

    def __init__(
        self,
        descriptor: int,
        plan: Plan,
        tensors: Sequence[tuple[str, StoredTensor]],
        uri: str,
        serial: Serial = "file",
    ) -> None:
        self._descriptor = descriptor
        self._size = plan.size
        self._tensors = tensors
        self._uri = uri
        self._serial: Serial = serial
        self._records = [(record.offset, record.nbytes) for record in plan.records]
        self._growing: GrowingFile | None = None
        self._beside: _Beside | None = None
        self.step_nbytes: int | None = None
        """How much should at most be written between two calls of `reached`."""
        places = [place for _, place in tensors]
        if plan.size > SMALL_NBYTES and plan.size < HUGE_NBYTES and is_crowded():
            hashing = OnePass(plan.size, self._records, places, serial)
            self.step_nbytes = max(1 << 20, min(STEP_NBYTES, ALL_STEPS_NBYTES // available_cores()))
            self._beside = _Beside(LocalFile(descriptor, self._refuse_end), hashing, self.step_nbytes)
        elif plan.size >= FOLLOWED_NBYTES:
            self._growing = GrowingFile(
                descriptor, plan.size, self._records, places, self._refuse_end, follow=True, serial=serial
            )

    def _refuse_end(self, offset: int, nbytes: int) -> bytes:
        raise VerificationError(f"{self._uri}: ends before byte {offset + nbytes}, more were written")

    def reached(self, position: int) -> None:
        """The first `position` bytes are written."""
        if self._growing is not None:
            self._growing.reached(position)
        elif self._beside is not None:
            self._beside.reached(position)

    def finish(self, file: DraftFile, progress: Callable[[int], None] | None = None) -> FileDigests:
        """The digests of the file, which is what `file` says.

        Raises:
            VerificationError: with the first difference found.
        """
        size = os.fstat(self._descriptor).st_size
        if size != file.size:
            raise VerificationError(f"{self._uri}: {size} bytes are there, {file.size} were written")
        if self._growing is not None:
            digests = self._growing.finish(progress)
        elif self._beside is not None:
            digests = self._beside.finish(size, progress)
        else:
            digests = digest_descriptor(
                self._descriptor,
                size,
                self._records,
                [place for _, place in self._tensors],
                progress,
                self._refuse_end,
                serial=self._serial,
            )
        tensors = [(name, place.offset) for name, place in self._tensors]
        compare_checksums(self._uri, file, tensors, digests, VerificationError)
        return digests

    def give_up(self) -> None:
        if self._growing is not None:
            self._growing.give_up()


class _Beside:
    """Hashes on the calling thread what has been written since the last call."""

    def __init__(self, file: LocalFile, hashing: OnePass, step_nbytes: int) -> None:
        self._file = file
        self._step_nbytes = step_nbytes
        self._hashing = hashing
        self._position = 0

    def reached(self, position: int) -> None:
        self._file.reached(position)
        nbytes = position - self._position
        for chunk in self._file.chunks(self._position, nbytes, most=self._step_nbytes):
            with hashing_slot():
                self._hashing.take(self._position, chunk)
            self._position += len(chunk)

    def finish(self, size: int, progress: Callable[[int], None] | None) -> FileDigests:
        self.reached(size)
        if progress is not None:
            progress(size)
        return self._hashing.finish(self._file.pieces)
