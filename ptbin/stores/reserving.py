"""Blocks for a local output before its bytes come: a disk too small says so at once, not after gigabytes.

Where that is a matter of extents, all of them at once. In tmpfs it fills pages with zeros, which takes a
third of the time of the copy: there step by step, ahead of the writer, so that nothing waits for the whole of
it; its free space is compared with what is to come.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable

__all__ = ["RESERVE_NBYTES", "Reservation"]

RESERVE_NBYTES = 16 << 20
"""Outputs at least this large get their blocks reserved."""
STEP_NBYTES = 128 << 20
FALLOC_FL_KEEP_SIZE = 1
"""Reserve blocks, leave the file's size alone (linux/falloc.h)."""
TMPFS, XFS, BTRFS = 0x01021994, 0x58465342, 0x9123683E
"""statfs(2), `f_type`: the first word of its structure on Linux."""
STATFS_NBYTES = 256
"""More than the structure has anywhere."""

Fallocate = Callable[[int, int, int, int], int]


class Reservation:
    """Of `nbytes` for an open file. Raises OSError (ENOSPC, EDQUOT, EFBIG) alone."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self._descriptor = descriptor
        self._nbytes = nbytes
        self._reserved = nbytes
        self._fallocate = _system_fallocate()
        if self._fallocate is None:
            return
        kind = _filesystem(descriptor)
        status = os.fstatvfs(descriptor)
        fits = status.f_blocks == 0 or status.f_bavail * status.f_frsize >= nbytes
        if kind != TMPFS:
            if kind != BTRFS and (fits or kind != XFS):
                self._reserve(0, nbytes)
            return
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._reserved = 0
        self.reached(0)

    def reached(self, position: int) -> None:
        """The file is written as far as `position`."""
        while self._reserved < min(self._nbytes, position + STEP_NBYTES // 2):
            step = min(STEP_NBYTES, self._nbytes - self._reserved)
            with contextlib.suppress(OSError):  # writing will meet it, and say so where it belongs
                self._reserve(self._reserved, step)
            self._reserved += step

    def _reserve(self, offset: int, nbytes: int) -> None:
        import ctypes

        assert self._fallocate is not None
        if self._fallocate(self._descriptor, FALLOC_FL_KEEP_SIZE, offset, nbytes):
            code = ctypes.get_errno()
            if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(code, os.strerror(code))


def _system_fallocate() -> Fallocate | None:
    """`fallocate` itself, not `os.posix_fallocate`: where the filesystem cannot, the C library's stand-in
    writes every block.
    """
    try:
        import ctypes

        function = ctypes.CDLL(None, use_errno=True).fallocate
    except (ImportError, OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function


def _filesystem(descriptor: int) -> int | None:
    """Its kind, as `f_type` has it; None where nobody says."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    structure = (ctypes.c_long * (STATFS_NBYTES // ctypes.sizeof(ctypes.c_long)))()
    if ctypes.CDLL(None).fstatfs(descriptor, ctypes.byref(structure)):
        return None
    return structure[0]
