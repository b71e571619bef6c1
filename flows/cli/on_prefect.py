"""Run a flow from the command line: open the run here, find a server, call, wait for the history."""

from __future__ import annotations

import gc
import os
from typing import Any

from flows.cli.progress import Problems
from flows.cli.shared_options import Shared
from ptbin.errors import PtbinError
from tasks.live import LiveRun, open_live_run

__all__ = ["run_flow"]


def run_flow(name: str, run_id: str, shared: Shared, listener: Problems, **parameters: Any) -> dict[str, Any]:
    """Call the flow `convert`, `migrate`, `restore`, `sync` or `verify` and return the summary it left.

    Raises:
        PtbinError: what the flow raised before it came to a summary.
        KeyboardInterrupt: the run was interrupted before it had anything to account for; what it comes to
            later has a summary all the same, with `interrupted` set. Prefect has recorded it as crashed.
    """
    if shared.log_level in {"debug", "info"}:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", shared.log_level.upper())
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", shared.log_level.upper())
    from flows.orchestrator import orchestrator

    live = LiveRun(run_id, shared.source_options, shared.dest_options, listener)
    listener.stage("starting Prefect")
    with orchestrator() as server, open_live_run(live):
        flow = _find_flow(name)
        from flows.signals import INTERRUPTS, hold_signals, is_hidden_interrupt

        # Prefect's modules stay to the end: a full collection would walk a million objects of them, 0.1 s.
        gc.freeze()
        listener.stage("looking at SOURCE and DEST" if name != "verify" else "looking at DEST")
        try:
            with hold_signals() as signals:
                state = flow(**parameters, run_id=run_id, return_state=True)
        except INTERRUPTS as error:
            if not live.summary.get("interrupted"):
                raise KeyboardInterrupt from error
            return live.summary
        except Exception as error:
            if is_hidden_interrupt(error):
                raise KeyboardInterrupt from error
            raise
        finally:
            complete = server.settle(live.summary.get("flow_run_id"), live.summary.get("task_runs"))
        if state.is_crashed():
            raise KeyboardInterrupt
        if "message" not in live.summary and signals.number is not None:
            raise KeyboardInterrupt
        if "message" not in live.summary:
            raise _error_of(state)
        if not complete:
            listener.tell("Prefect's server has not recorded every task run; the results are not affected")
    return live.summary


def _find_flow(name: str) -> Any:
    if name == "convert":
        from flows.convert import convert

        return convert
    if name == "migrate":
        from flows.migrate import migrate

        return migrate
    if name == "sync":
        from flows.sync import sync

        return sync
    if name == "restore":
        from flows.restore import restore

        return restore
    from flows.verify import verify

    return verify


def _error_of(state: Any) -> Exception:
    error = state.result(raise_on_failure=False)
    return (
        error if isinstance(error, Exception) else PtbinError(f"the flow ended {state.name}: {state.message}")
    )
