"""Blocks for a local output before its bytes come: a disk too small says so at once, not after gigabytes.

Where that is a matter of extents. In tmpfs it fills pages with zeros, which takes a tenth of the time of the
copy: there its free space is compared with what is to come. On XFS and btrfs a copy may share its source's
blocks and needs no room.
"""

from __future__ import annotations

import errno
import os
import sys

RESERVE_NBYTES = 16 << 20
"""Outputs at least this large get their blocks reserved."""
FALLOC_FL_KEEP_SIZE = 1
"""Reserve blocks, leave the file's size alone (linux/falloc.h)."""
TMPFS, XFS, BTRFS = 0x01021994, 0x58465342, 0x9123683E
"""statfs(2), `f_type`: the first word of its structure on Linux."""
STATFS_NBYTES = 256
"""More than the structure has anywhere."""


def reserve(descriptor: int, nbytes: int) -> None:
    """Of the empty open file. Raises OSError (ENOSPC, EDQUOT, EFBIG) alone."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    # Not `os.posix_fallocate`: where the filesystem cannot, the C library's stand-in writes every block.
    library = ctypes.CDLL(None, use_errno=True)
    kind = filesystem_kind(descriptor)
    status = os.fstatvfs(descriptor)
    fits = status.f_blocks == 0 or status.f_bavail * status.f_frsize >= nbytes
    if kind == TMPFS and not fits:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind in (TMPFS, BTRFS) or (kind == XFS and not fits) or not hasattr(library, "fallocate"):
        return
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if library.fallocate(descriptor, FALLOC_FL_KEEP_SIZE, 0, nbytes):
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


def filesystem_kind(descriptor: int) -> int | None:
    """Of an open file, as `f_type` has it; None where the system does not say."""
    import ctypes

    library = ctypes.CDLL(None)
    structure = (ctypes.c_long * (STATFS_NBYTES // ctypes.sizeof(ctypes.c_long)))()
    return None if library.fstatfs(descriptor, ctypes.byref(structure)) else structure[0]
