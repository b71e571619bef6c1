"""Python's cycle collector, paused while records are made.

An index of a million tensors is tens of millions of objects that all stay and form no cycles. The collector
would walk them again and again as they grow, which takes a quarter of the time.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_pausing = 0
_was_enabled = False


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """No collection until the last of the threads that are inside leaves; as before afterwards."""
    global _pausing, _was_enabled  # noqa: PLW0603 - the collector is the process's, too
    with _lock:
        if _pausing == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pausing += 1
    try:
        yield
    finally:
        with _lock:
            _pausing -= 1
            if _pausing == 0 and _was_enabled:
                gc.enable()
