"""Ctrl-C and SIGTERM: one way out, through every `with` that is open.

The first signal raises `KeyboardInterrupt` in the main thread, so writers abort and nothing half-written
stays. A second one ends the process at once: what it leaves has a temporary name or no manifest, and
no later run takes that for finished.

The exception may come out of the middle of other code and leave it as another one (pydantic wraps
what is raised in its serializers), so it is also noted that a signal came.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["INTERRUPTED_STATUS", "SignalHandler", "handle_signals", "interrupts_held"]

INTERRUPTED_STATUS = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalHandler:
    """Whether a signal came."""

    def __init__(self) -> None:
        self.interrupted = False

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of the first one."""
        del number, frame
        self.interrupted = True
        for other in _SIGNALS:
            signal.signal(other, _leave_at_once)
        raise KeyboardInterrupt


@contextlib.contextmanager
def handle_signals(signals: SignalHandler) -> Iterator[None]:
    """Handle both signals while the context lasts; only the main thread can, others are left alone."""
    with _handlers(signals.interrupt):
        yield


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """While Prefect is imported: a signal that comes is raised at the end, a second one ends the process."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if came:
            os._exit(INTERRUPTED_STATUS)
        came.append(number)

    with _handlers(note) as before:
        yield
    if came:
        handler = before[came[0]]
        if callable(handler):
            handler(came[0], None)
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[int, Any]]:
    """Both signals have this handler while the context lasts, in the main thread; those of before."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(INTERRUPTED_STATUS)
