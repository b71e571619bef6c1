"""Run a flow from the command line: open the run here, find a server, call, wait for the history."""

from __future__ import annotations

import gc
import importlib
import os
import time
from typing import TYPE_CHECKING, Any

from flows.cli.command import Shared
from flows.cli.destination import leaving_no_empty_folders
from flows.cli.progress import Problems
from flows.cli.started import began
from flows.interrupts import hold_signals, interrupts_held
from flows.parsing import refuse_runner_secrets
from flows.prefect.open_files import allow_open_files
from ptbin.errors import PtbinError
from ptbin.installed import require
from ptbin.runs.run_ids import new_run_id
from tasks.live import LiveRun, open_live_run

if TYPE_CHECKING:
    from ptbin.catalog.request import RunRequest


def run_prepared(
    request: RunRequest, shared: Shared, listener: Problems, **parameters: Any
) -> dict[str, Any]:
    """As `run_flow`, with the plan made first: without Prefect where nothing is to be done.

    The server starts while SOURCE is still listed, as soon as there is something to convert.

    Raises:
        PtbinError, KeyboardInterrupt: as `run_flow`; UsageError: there is nothing below SOURCE.
    """
    from flows.prepared import finish_in_step, preparing, refuse_nothing

    refuse_runner_secrets(parameters.get("runner_address"))
    _check_machine()  # before anything is written
    live = _live_run(shared, listener)

    def start_server() -> None:
        from flows.prefect.orchestrator import start_early

        _set_logging(shared)
        start_early()

    refuse_nothing(live, request)
    listener.stage("looking at SOURCE and DEST")
    with leaving_no_empty_folders(live.sides.dest_at(request.dest)), preparing(live, request, start_server):
        if (summary := finish_in_step(live, parameters.get("min_success"))) is not None:
            return summary
        places = {"source": request.source, "dest": request.dest}
        return _run(request.kind, live, shared, places | parameters)


def run_flow(name: str, shared: Shared, listener: Problems, **parameters: Any) -> dict[str, Any]:
    """Call the flow `convert`, `migrate`, `restore`, `sync` or `verify` and return the summary it left.

    Raises:
        PtbinError: what the flow raised before it had a summary. A run that was stopped by then has one.
        KeyboardInterrupt: the run was interrupted before it had anything to account for; interrupted
            later, it has a summary with `interrupted` set. Prefect has recorded it as crashed.
    """
    refuse_runner_secrets(parameters.get("runner_address"))
    return _run(name, _live_run(shared, listener), shared, parameters)


def _live_run(shared: Shared, listener: Problems) -> LiveRun:
    return LiveRun(new_run_id(), shared.source_options, shared.dest_options, listener, began=began())


def _check_machine() -> None:
    """Refuse what would keep the run from its end.

    Raises:
        UsageError: too few files may be opened; a package is missing.
    """
    require("prefect", "more than one checkpoint at a time")
    require("jinja2", "the report of a run")
    allow_open_files()


def _set_logging(shared: Shared) -> None:
    """Before Prefect is imported."""
    if shared.log_level in {"debug", "info"}:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", shared.log_level.upper())
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", shared.log_level.upper())


def _run(name: str, live: LiveRun, shared: Shared, parameters: dict[str, Any]) -> dict[str, Any]:
    _check_machine()
    _set_logging(shared)
    from flows.prefect.orchestrator import import_prefect, orchestrator

    listener = live.listener
    assert isinstance(listener, Problems)
    listener.stage("starting Prefect")
    with interrupts_held():
        import_prefect()
    with orchestrator() as server, open_live_run(live):
        with interrupts_held():
            flow = getattr(importlib.import_module(f"flows.{name}"), name)
            from prefect import tags

            from flows.access import RunStoppedError
            from flows.notices import TAG
            from flows.prefect.signals import INTERRUPTS, is_hidden_interrupt

        # Prefect's modules stay to the end: a full collection would walk a million objects of them, 0.1 s.
        gc.freeze()
        if live.plan is None or not live.plan.is_made:
            listener.stage("looking at SOURCE and DEST" if name != "verify" else "looking at DEST")
        try:
            with hold_signals() as signals, tags(TAG):
                state = flow(**parameters, run_id=live.run_id, return_state=True)
        except INTERRUPTS as error:
            if not live.summary.get("interrupted"):
                raise KeyboardInterrupt from error
            return live.summary
        except Exception as error:
            # With a summary the run is over; what failed is to record its end on the server.
            if "message" in live.summary:
                listener.report(f"Prefect's server did not record the end of the run: {type(error).__name__}")
                return live.summary
            if is_hidden_interrupt(error):
                raise KeyboardInterrupt from error
            raise
        finally:
            complete = server.settle(live.summary.get("flow_run_id"), live.summary.get("task_runs"))
        if "message" not in live.summary and (state.is_crashed() or signals.number is not None):
            raise KeyboardInterrupt
        if "message" not in live.summary:
            fault = _error_of(state)
            if not isinstance(fault, RunStoppedError):
                raise fault
            listener.report(f"{fault.reason}: {fault}")
            return _stopped_summary(name, live, parameters, fault)
        if not complete:
            listener.report("Prefect's server has not recorded every task run; the results are not affected")
    return live.summary


def _stopped_summary(
    name: str, live: LiveRun, parameters: dict[str, Any], error: PtbinError
) -> dict[str, Any]:
    """That of a run that was stopped while it was still looking at what there is to do."""
    from ptbin.catalog import Problem
    from ptbin.runs.migrating import MigrationTally
    from ptbin.runs.tally import Tally

    make = MigrationTally if name == "migrate" else Tally
    tally = make(live.run_id, parameters["source"], parameters["dest"], kind=name)
    tally.run_problems.append(Problem(tally.dest, error.reason, str(error)))
    return tally.summary(time.monotonic() - live.began) | {"message": tally.message(), "succeeded": False}


def _error_of(state: Any) -> Exception:
    error = state.result(raise_on_failure=False)
    return (
        error if isinstance(error, Exception) else PtbinError(f"the flow ended {state.name}: {state.message}")
    )
