"""Prefect's embedded server, started in a thread while the command line is still listing SOURCE.

One start for each process. A process that ends without having used it takes the server along: that ends when
its standard input does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future

Started = tuple[str | None, contextlib.ExitStack]
"""The server's URL, and what ends it."""

_THREAD = "ptbin-server-start"
_started: Future[Started] | None = None


def begin_early(start: Callable[[contextlib.ExitStack], str | None]) -> None:
    """Begin, once; `start` returns the URL of the server and leaves in the stack what ends it."""
    global _started  # noqa: PLW0603 - one for each process
    if _started is not None:
        return
    _started = started = Future[Started]()

    def run() -> None:
        stack = contextlib.ExitStack()
        try:
            started.set_result((start(stack), stack))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            started.set_exception(error)

    # Not an executor: its threads are waited for at the end of the process.
    threading.Thread(target=run, name=_THREAD, daemon=True).start()


def take_early() -> Future[Started] | None:
    """What was begun, for the caller to use and to end."""
    global _started
    taken, _started = _started, None
    return taken


def is_starting() -> bool:
    """Whether a thread is still at it, awaited or not."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
