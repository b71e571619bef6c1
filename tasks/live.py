"""What a run's tasks share in memory and Prefect must never see: storage options, progress, the stop sign.

Task and flow parameters are stored on Prefect's server and shown in its UI, so secrets cannot be among
them. A flow opens a `LiveRun` under its run id; its tasks, threads of the same process, find it there.
A task runner in other processes would need another way (a block that the task loads itself); the
lookup says so instead of running without credentials.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptbin.catalog.worklist import WorkList
    from ptbin.stores.limits import RequestLimit

__all__ = ["Interrupted", "Listener", "LiveRun", "find_live_run", "is_open", "open_live_run"]


class Interrupted(BaseException):
    """Raised inside the engine's progress callback once a run is being stopped.

    Not an `Exception`: nothing between the callback and the task may take it for an error of the
    checkpoint. Writers abort on their way out, so no output appears.
    """


class Listener:
    """Hears how a run gets on; this one does nothing with it. Called from several threads."""

    def planned(self, files: int, nbytes: int, up_to_date: int) -> None:
        """So many files with so many bytes are going to be worked on."""

    def moved(self, nbytes: int) -> None:
        """So many bytes were moved or read back since the last call."""

    def settled(self, path: str, kind: str, *, nbytes: int, reason: str = "", detail: str = "") -> None:
        """One file of that size has its outcome."""


@dataclass(slots=True, eq=False)
class LiveRun:
    """The in-process side of one run. Never serialised; its `repr` shows no options."""

    run_id: str
    source_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    dest_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    listener: Listener = field(default_factory=Listener, repr=False)
    stopping: threading.Event = field(default_factory=threading.Event, repr=False)
    work: WorkList | None = field(default=None, repr=False)
    """What the run is to do; its flow opens it, the listing fills it."""
    requests: RequestLimit | None = field(default=None, repr=False)
    """How many requests all tasks of the run may have under way together."""
    summary: dict[str, Any] = field(default_factory=dict, repr=False)
    """Filled by the flow at its end, for the process that started it."""

    def moved(self, nbytes: int) -> None:
        """The progress callback handed to the engine.

        Raises:
            Interrupted: the run is being stopped.
        """
        if self.stopping.is_set():
            raise Interrupted(self.run_id)
        self.listener.moved(nbytes)


_runs: dict[str, LiveRun] = {}


@contextlib.contextmanager
def open_live_run(live: LiveRun) -> Iterator[LiveRun]:
    """Make `live` findable by its run id while the context lasts; what still runs then is told to stop."""
    _runs[live.run_id] = live
    try:
        yield live
    finally:
        live.stopping.set()
        del _runs[live.run_id]


def find_live_run(run_id: str) -> LiveRun:
    """The open run of this process with that id.

    Raises:
        LookupError: this process runs no such run; to go on would mean to go on without credentials.
    """
    try:
        return _runs[run_id]
    except KeyError:
        raise LookupError(
            f"run {run_id} is not open in this process: its tasks must run as threads"
        ) from None


def is_open(run_id: str) -> bool:
    return run_id in _runs
