"""What a run's tasks share and Prefect must never see: storage options, progress, the stop sign.

Task and flow parameters are stored on Prefect's server and shown in its UI, so secrets cannot be among
them. A flow opens a `LiveRun` under its run id; tasks that are threads of the same process find it there. A
task in another process gets a `Ticket` and makes its own live run from it, shared by all tasks of that run in
its process, which learns from the run's lease on DEST when to stop.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ptbin.stores import Sides
from tasks.credentials import Credentials

if TYPE_CHECKING:
    from ptbin.catalog.lease import Lease
    from ptbin.catalog.plan import Plan
    from ptbin.catalog.request import RunRequest
    from ptbin.runs.outcomes import Outcome
    from ptbin.stores.requests import RequestLimit


class Interrupted(BaseException):
    """Raised inside the engine's progress callback once a run is being stopped.

    Not an `Exception`: nothing between the callback and the task may take it for an error of the
    checkpoint. Writers abort on their way out, so no output appears.
    """


class Listener:
    """Follows how a run gets on; this one ignores it. Called from several threads."""

    def planned(self, files: int, nbytes: int, up_to_date: int) -> None:
        """The number of files that are going to be worked on, and their bytes."""

    def noted(self, text: str) -> None:
        """Something that is to be known before the run writes."""

    def moved(self, nbytes: int) -> None:
        """The bytes that were moved or read back since the last call."""

    def settled(self, entry: Outcome) -> None:
        """One file has its final outcome."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a task needs to take part in a run, wherever it is worked on. Its `repr` shows no options."""

    run_id: str
    source: Credentials = field(default_factory=Credentials, repr=False)
    dest: Credentials = field(default_factory=Credentials, repr=False)
    requests: int | None = None
    """How many requests each process of the run may have under way."""
    lease: str | None = None
    """URI of the run's lease on DEST."""
    goes_out: bool = False
    """Whether it is for other processes; else the run must be open where the task is."""
    folder: str | None = None
    """Working folder that relative places mean, for processes that begin in another one."""


@dataclass(slots=True, eq=False)
class LiveRun:
    """The in-process side of one run. Never serialised; its `repr` shows no options."""

    run_id: str
    source_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    dest_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    listener: Listener = field(default_factory=Listener, repr=False)
    stopping: threading.Event = field(default_factory=threading.Event, repr=False)
    began: float = field(default_factory=time.monotonic, repr=False)
    """When it began: for a person, the moment the command was given."""
    check: Callable[[], object] = field(default=lambda: None, repr=False)
    """Raises in the flow's own thread what a signal stands for, if one came."""
    stop_reason: str = field(default="", repr=False)
    """Why a run stops that was not interrupted: its deadline has passed, its lease is lost."""
    plan: Plan | None = field(default=None, repr=False)
    """What the run is to do: opened, and mostly made, by the command line, or else by the flow."""
    lease: Lease | None = field(default=None, repr=False)
    """On DEST, where it was acquired before the flow began."""
    requests: RequestLimit | None = field(default=None, repr=False)
    """How many requests all tasks of the run in this process may have under way together."""
    task_runs: int = field(default=0, repr=False)
    """How many task runs its flow has made."""
    summary: dict[str, Any] = field(default_factory=dict, repr=False)
    """Filled by the flow at its end, for the process that started it."""

    @property
    def sides(self) -> Sides:
        """What makes places of URIs, with the run's storage options."""
        return Sides(self.source_options, self.dest_options)

    @property
    def opened_plan(self) -> Plan:
        """The plan of a run that has one: `open_plan` comes first."""
        assert self.plan is not None
        return self.plan

    @contextlib.contextmanager
    def open_plan(self, request: RunRequest) -> Iterator[Plan]:
        """The run's plan, not yet made, while the context lasts."""
        from ptbin.catalog.plan import Plan

        with contextlib.closing(Plan(request, self.sides)) as plan:
            self.plan = plan
            try:
                yield plan
            finally:
                self.plan = None

    def moved(self, nbytes: int) -> None:
        """The progress callback handed to the engine.

        Raises:
            Interrupted: the run is being stopped.
        """
        if self.stopping.is_set():
            raise Interrupted(self.run_id)
        self.listener.moved(nbytes)

    def tick(self) -> None:
        """For what takes long in the flow's own thread; raises what `moved` raises, or an interrupt."""
        self.check()
        self.moved(0)

    def stop(self, reason: str) -> None:
        """Begin nothing new and stop what is under way."""
        self.stop_reason = self.stop_reason or reason
        self.stopping.set()


_runs: dict[str, LiveRun] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def open_live_run(live: LiveRun) -> Iterator[LiveRun]:
    """Make `live` findable by its run id while the context lasts; what still runs then is stopped."""
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
        raise LookupError(f"run {run_id} is not open in this process") from None


def is_open(run_id: str) -> bool:
    return run_id in _runs


def enter_run(ticket: Ticket) -> LiveRun:
    """The run of that ticket as this process knows it; another process's run is joined.

    Raises:
        UsageError: its credentials cannot be had here.
        LookupError: it was to be open in this process, and is not.
    """
    if not ticket.goes_out:
        return find_live_run(ticket.run_id)
    from ptbin.stores.requests import RequestLimit

    with _lock:
        if (live := _runs.get(ticket.run_id)) is not None:
            return live
        if ticket.folder is not None:
            with contextlib.suppress(OSError):  # another machine may not have it
                os.chdir(ticket.folder)
        live = LiveRun(ticket.run_id, ticket.source.load(), ticket.dest.load())
        if ticket.requests is not None:
            live.requests = RequestLimit(ticket.requests)
        if ticket.lease is None:
            return live  # without a lease nothing says when to forget it
        _runs[ticket.run_id] = live
    _watch(live, ticket.lease)
    return live


def _watch(live: LiveRun, lease: str) -> None:
    from ptbin.catalog.lease import LeaseWatch

    def stop() -> None:
        live.stopping.set()
        with _lock:
            _runs.pop(live.run_id, None)

    LeaseWatch(live.sides.dest_at(lease), stop)


def stop_all() -> None:
    """Stop every run that this process takes part in: the process that it works for is gone."""
    for live in list(_runs.values()):
        live.stopping.set()
