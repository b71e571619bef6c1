"""What a flow run needs before it can work: its live run, its work list, its lease on DEST, its runner.

The command line puts storage options into the run that it opens (`tasks.live`). A deployment names where
they lie (`tasks.credentials`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from flows.interrupts import hold_signals
from flows.metering import metering
from flows.notices import tag_flow_run
from flows.options import RunSettings
from flows.parsing import refuse_runner_secrets
from flows.prefect.undocumented import without_tags
from flows.runners import Runner, open_runner
from ptbin.catalog.lease import Lease, acquire_lease
from ptbin.catalog.request import RunRequest
from ptbin.errors import PtbinError
from ptbin.runs.run_ids import check_run_id
from ptbin.stores.requests import RequestLimit
from tasks.credentials import Credentials, load_options
from tasks.live import Interrupted, LiveRun, Ticket, find_live_run, is_open, open_live_run


class RunStoppedError(PtbinError):
    """The run was stopped, by its deadline or by the loss of its lease, before it had begun with anything."""

    reason = "run_stopped"


@contextlib.contextmanager
def join_run(run_id: str, settings: RunSettings) -> Iterator[LiveRun]:
    """The run that the caller opened in this process, or else a new one with the options referred to.

    Raises:
        UsageError: not a valid id, or options that cannot be found here.

    Whatever ends the context other than its end, an interrupt above all, stops the tasks that still run:
    Prefect's thread pool would wait for them.
    """
    check_run_id(run_id)
    with contextlib.ExitStack() as stack:
        if is_open(run_id):
            live = find_live_run(run_id)
        else:
            live = LiveRun(run_id, load_options(settings.source_options), load_options(settings.dest_options))
            stack.enter_context(open_live_run(live))
        live.summary["flow_run_id"] = current_flow_run_id()
        tag_flow_run()
        stack.enter_context(without_tags())
        stack.enter_context(metering(live))
        live.check = stack.enter_context(hold_signals()).check
        try:
            live.check()
            yield live
        except BaseException:
            live.stopping.set()
            raise


@dataclass(slots=True)
class Running:
    """A run under way: what its flow and its batches share."""

    live: LiveRun
    settings: RunSettings
    runner: Runner
    ticket: Ticket
    lease: Lease | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self, reason: str = "") -> None:
        """Stop what is under way, here and in the runner's processes, and begin nothing new."""
        self.live.stop(reason)
        if self.lease is not None and self.runner.is_remote and not self.stopped.is_set():
            self.stopped.set()
            self.lease.ask_to_stop()

    @property
    def is_stopping(self) -> bool:
        return self.live.stopping.is_set()


@contextlib.contextmanager
def running(live: LiveRun, request: RunRequest | None, settings: RunSettings) -> Iterator[Running]:
    """Begin to work: with a request under the lease of its destination, and with a plan, not yet made.

    Raises:
        DestinationBusyError: another run works on DEST.
        UsageError: the runner's engine is not there.
        RunStoppedError: its deadline passed, or its lease was lost, while it was still listing.
    """
    refuse_runner_secrets(settings.runner_address)
    with _stops_as_error(live), contextlib.ExitStack() as stack:
        lease = None
        if request is not None:
            if live.plan is None:
                stack.enter_context(live.open_plan(request))
            lease = live.lease
            if lease is None:
                lease = acquire_lease(
                    live.sides.dest_at(request.dest),
                    live.run_id,
                    lost=live.stop,
                    tick=live.tick,
                )
                stack.callback(lease.release)
        live.requests = RequestLimit(settings.max_requests)
        runner = stack.enter_context(open_runner(settings.runner, settings.runner_address, settings.workers))
        ticket = Ticket(
            live.run_id,
            Credentials.to_send(settings.source_options, live.source_options),
            Credentials.to_send(settings.dest_options, live.dest_options),
            # Processes cannot count together: each may have its share.
            max(1, settings.max_requests // runner.width) if runner.is_remote else settings.max_requests,
            lease.uri if lease is not None else None,
            goes_out=runner.is_remote,
            folder=os.getcwd() if runner.begins_elsewhere else None,
        )
        run = Running(live, settings, runner, ticket, lease)
        if settings.deadline is not None:
            text = f"the run's deadline of {settings.deadline:g} s has passed"
            timer = threading.Timer(settings.deadline, run.stop, [text])
            timer.daemon = True
            timer.start()
            stack.callback(timer.cancel)
        yield run


@contextlib.contextmanager
def _stops_as_error(live: LiveRun) -> Iterator[None]:
    """What stops a run in the flow's own thread becomes an error of the run, not a crash of its process."""
    try:
        yield
    except Interrupted as error:
        raise RunStoppedError(f"{live.stop_reason or 'the run was stopped'}; nothing was begun") from error


def current_flow_run_id() -> str | None:
    """The id under which the server knows the flow run that this thread works for."""
    from prefect.runtime import flow_run

    found: str | None = flow_run.id
    return found


def run_url() -> str | None:
    """The page of this thread's flow run; None on a server that ends with it, and where no UI is known."""
    from prefect.utilities.urls import url_for

    from flows.prefect import orchestrator

    run_id = current_flow_run_id()
    return None if run_id is None or orchestrator.is_embedded() else url_for("flow-run", run_id)
