"""Prefect's embedded server, started in a thread while the command line is still listing SOURCE.

One start for each process. A process that ends without having used it takes the server along: that ends when
its standard input does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

__all__ = ["EarlyStart", "begin_early", "is_starting", "take_early"]


_threads: list[threading.Thread] = []


class EarlyStart:
    """The thread, and what it came to."""

    def __init__(self, start: Callable[[contextlib.ExitStack], str | None]) -> None:
        self._begin = start
        self._stack = contextlib.ExitStack()
        self._url: str | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._start, name="ptbin-server-start", daemon=True)
        _threads.append(self._thread)
        self._thread.start()

    def _start(self) -> None:
        try:
            self._url = self._begin(self._stack)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error

    def wait(self) -> tuple[str | None, contextlib.ExitStack]:
        """The URL of the server, and what ends it. Raises what the start raised."""
        while self._thread.is_alive():
            self._thread.join(0.2)  # an interrupt comes through
        if self._error is not None:
            raise self._error
        return self._url, self._stack


_started: EarlyStart | None = None


def begin_early(start: Callable[[contextlib.ExitStack], str | None]) -> None:
    """Begin, once; `start` returns the URL of the server and leaves in the stack what ends it."""
    global _started  # noqa: PLW0603 - one for each process
    if _started is None:
        _started = EarlyStart(start)


def take_early() -> EarlyStart | None:
    """What was begun, for the one who uses it and ends it."""
    global _started
    taken, _started = _started, None
    return taken


def is_starting() -> bool:
    """Whether a thread is still at it, awaited or not."""
    return any(thread.is_alive() for thread in _threads)
