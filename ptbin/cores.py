"""The processor's cores that this process may use, and the one pool of threads that hashes on them.

However many checkpoints are worked on at once, no more threads hash than there are cores: whoever hashes
holds a slot while it does. One file is hashed by as many threads as there are cores, each of many by one.
hashlib and zlib release the interpreter's lock for pieces of this size, so threads are enough.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

MAX_DEFAULT_WORKERS = 16

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_slots: _Slots | None = None
_sharing = 1
"""Processes that share the cores."""
_at_work = 0
"""Files that this process writes and proves."""


def share_cores(processes: int) -> None:
    """This process is one of several that work on checkpoints side by side: each takes its part of the cores.

    To be called while nothing is hashed: the pool is made anew, for the cores that there are by then.
    """
    global _sharing  # noqa: PLW0603 - of the process
    _sharing = max(1, processes)
    _cgroup_cores.cache_clear()
    _forget()


def available_cores() -> int:
    """Cores by affinity and, on Linux, by the limit of the control group, and this process's part of them; at
    least 1.
    """
    count = getattr(os, "process_cpu_count", None)
    if count is not None:
        cores = count() or 1
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(cores, _cgroup_cores() or cores) // _sharing)


def default_workers() -> int:
    """Checkpoints worked on at once: one a core, 2 to 16; the last one then has all cores to itself."""
    return min(max(available_cores(), 2), MAX_DEFAULT_WORKERS)


@cache
def _cgroup_cores() -> int | None:
    """Whole cores that the control group grants, rounded up (Linux, cgroup v2 `cpu.max`, v1 `cpu.cfs_*`)."""
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            words = Path(quota_file).read_text().split()
            if period_file is not None:
                words += Path(period_file).read_text().split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):
            continue
        return -(-quota // period) if quota > 0 and period > 0 else None
    return None


def hashing_pool() -> ThreadPoolExecutor:
    """The threads that hash next to the calling one; at least one."""
    global _pool  # noqa: PLW0603 - one for the process
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, available_cores() - 1), thread_name_prefix="ptbin-hash")
        return _pool


class _Slots:
    """As many as there are cores, less those that are busy with what nothing may keep waiting."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._held = self._busy = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            while self._held >= max(1, self._cores - self._busy):
                self._changed.wait()
            self._held += 1

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._held -= 1
            self._changed.notify()

    def keep(self, count: int) -> None:
        with self._changed:
            self._busy += count
            self._changed.notify_all()


def hashing_slot() -> _Slots:
    """Hold it while a piece is hashed; the serial lane of a file needs none (`busy_core`)."""
    global _slots  # noqa: PLW0603 - as above
    with _lock:
        if _slots is None:
            _slots = _Slots(available_cores())
        return _slots


@contextmanager
def busy_core() -> Iterator[None]:
    """While a thread does what all else of a file waits for in the end: fewer others hash meanwhile."""
    slots = hashing_slot()
    slots.keep(1)
    try:
        yield
    finally:
        slots.keep(-1)


@contextmanager
def at_work() -> Iterator[None]:
    """While one file is being written and proven, in whichever thread."""
    global _at_work  # noqa: PLW0603 - as above
    with _lock:
        _at_work += 1
    try:
        yield
    finally:
        with _lock:
            _at_work -= 1


def spare_cores() -> int:
    """Cores for each of the files that this process writes and proves; at least 1."""
    return max(1, available_cores() // max(1, _at_work))


def is_crowded() -> bool:
    """Whether there is less than two cores for each file: then one is better hashed by the thread that writes
    it.
    """
    return _at_work > 1 and spare_cores() < 2


def _forget() -> None:
    """In a forked child, where the threads are gone and a slot may be held for ever."""
    global _pool, _slots, _lock, _at_work  # noqa: PLW0603 - as above
    _pool = _slots = None
    _at_work = 0
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
