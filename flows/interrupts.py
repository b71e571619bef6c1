"""Ctrl-C and SIGTERM: raised at once, or held until nothing is half done. Knows nothing of Prefect.

Raised, `KeyboardInterrupt` goes through every `with` that is open, so writers abort and nothing half-written
stays. A second Ctrl-C ends the process at once: what it leaves has a temporary name or no manifest, and no
later run takes that for finished.

Python runs a signal's handler between any two steps of the main thread. An exception that comes out of the
middle of other code may arrive as another one (pydantic wraps what is raised in its serializers), or not at
all, and bookkeeping that it cuts through no longer adds up. So a signal is also noted, and while Prefect is
at work it is only noted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

INTERRUPTED_STATUS = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalHandler:
    """Raises at the first signal; whether one came."""

    def __init__(self) -> None:
        self.interrupted = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of the first one."""
        del number, frame
        self.interrupted = True
        for other in _SIGNALS:
            signal.signal(other, lambda *_: os._exit(INTERRUPTED_STATUS))
        raise KeyboardInterrupt


class HeldSignals:
    """Notes a signal; `check` raises it."""

    def __init__(self) -> None:
        self.number: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """A second Ctrl-C ends the process.

        A second SIGTERM does not: it is not a sign of impatience. systemd sends one to a worker's whole group
        and the worker sends its own; Prefect repeats it on the way out, for the handler that was there before
        its own (`capture_sigterm`). SIGKILL is there for those who cannot wait.
        """
        del frame
        if self.number is None:
            self.number = number
        elif number == signal.SIGINT:
            os._exit(INTERRUPTED_STATUS)

    def check(self) -> None:
        """Raises what the signal stands for, if one came: `KeyboardInterrupt`, or Prefect's own error."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is not None:
            from prefect.exceptions import TerminationSignal

            raise TerminationSignal(signal=self.number)


@contextlib.contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[int, Any]]:
    """Both signals have this handler while the context lasts; yields the handlers of before.

    Only in the main thread: others cannot, and are left alone.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """While Prefect is imported: a signal that comes is raised at the end."""
    held = HeldSignals()
    with handle_signals(held.handle) as before:
        yield
    if held.number is not None:
        if callable(handler := before[held.number]):
            handler(held.number, None)
        raise KeyboardInterrupt


_held: HeldSignals | None = None


@contextlib.contextmanager
def hold_signals() -> Iterator[HeldSignals]:
    """Hold both signals while the context lasts.

    Inside another such context it is the same: what came before is known here as well.
    """
    global _held  # noqa: PLW0603 - signals are the process's
    if threading.current_thread() is not threading.main_thread():
        yield HeldSignals()
        return
    outer, held = _held, _held or HeldSignals()
    _held = held
    try:
        with handle_signals(held.handle):
            yield held
    finally:
        _held = outer


def end_run() -> None:
    """As if SIGTERM had come, from any thread, to the run that is under way: its parent is gone."""
    if _held is not None and _held.number is None:
        _held.number = signal.SIGTERM
