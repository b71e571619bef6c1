"""Ctrl-C and SIGTERM while a run is under way: noted at once, raised where nothing is half done.

Python runs a signal's handler between any two steps of the main thread. An exception that comes out of the
middle of Prefect's or pydantic's code arrives as another one, or not at all, and bookkeeping that it cuts
through no longer adds up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from prefect.exceptions import TerminationSignal

__all__ = ["INTERRUPTS", "HeldSignals", "end_run", "hold_signals", "is_hidden_interrupt"]

INTERRUPTS = (KeyboardInterrupt, TerminationSignal)
"""What Ctrl-C and SIGTERM are raised as while a flow runs; the latter is Prefect's."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED_STATUS = 130


class HeldSignals:
    """What came so far."""

    def __init__(self) -> None:
        self.number: int | None = None

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The handler. A second Ctrl-C ends the process: what it leaves has no manifest.

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
        """Raises what the signal stands for, if one came."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is not None:
            raise TerminationSignal(signal=self.number)


_held: HeldSignals | None = None


def end_run() -> None:
    """As if SIGTERM had come, from any thread, to the run that is under way: its parent is gone."""
    if _held is not None and _held.number is None:
        _held.number = signal.SIGTERM


def is_hidden_interrupt(error: BaseException) -> bool:
    """Whether another error stands for an interrupt that came in the middle of other code.

    pydantic wraps whatever is raised in its serializers, a signal's exception too, and keeps only the name.
    Prefect handles SIGTERM itself from the start of a flow run until the flow's first line.
    """
    return any(kind.__name__ in f"{type(error).__name__}: {error}" for kind in INTERRUPTS)


@contextlib.contextmanager
def hold_signals() -> Iterator[HeldSignals]:
    """Hold both signals while the context lasts; only the main thread can, others are left alone.

    Inside another such context it is the same: what came before is known here as well.
    """
    global _held  # noqa: PLW0603 - signals are the process's
    if threading.current_thread() is not threading.main_thread():
        yield HeldSignals()
        return
    outer, held = _held, _held or HeldSignals()
    _held = held
    before = {number: signal.signal(number, held.hear) for number in _SIGNALS}
    try:
        yield held
    finally:
        _held = outer
        for number, handler in before.items():
            signal.signal(number, handler)
