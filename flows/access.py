"""Where a flow run takes its storage options from, so that none of them is a parameter.

The command line puts them into the run it opens (`tasks.live`). A deployment names where they lie:
`block:NAME`, a Prefect Secret block, or `env:NAME`, a variable of the worker's environment; either
holds one JSON object. The reference is a parameter and visible, what it refers to is not.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any, cast

from ptbin.catalog.worklist import WorkList
from ptbin.errors import UsageError
from ptbin.stores.limits import RequestLimit
from tasks.live import LiveRun, find_live_run, is_open, open_live_run

__all__ = ["DEFAULT_REQUESTS", "current_flow_run_id", "join_run", "load_options", "open_work"]

DEFAULT_REQUESTS = 64
"""What all tasks of a run may have under way together, unless it is asked for otherwise."""


@contextlib.contextmanager
def join_run(run_id: str, source_options: str | None, dest_options: str | None) -> Iterator[LiveRun]:
    """The run that the caller opened in this process, or else a new one with the options referred to.

    Whatever ends the context other than its end, an interrupt above all, stops the tasks that still run:
    Prefect's thread pool would wait for them.
    """
    with contextlib.ExitStack() as stack:
        if is_open(run_id):
            live = find_live_run(run_id)
        else:
            live = LiveRun(run_id, load_options(source_options), load_options(dest_options))
            stack.enter_context(open_live_run(live))
        live.summary["flow_run_id"] = current_flow_run_id()
        try:
            yield live
        except BaseException:
            live.stopping.set()
            raise


@contextlib.contextmanager
def open_work(live: LiveRun, dest: str, max_requests: int) -> Iterator[WorkList]:
    """The work list of a run into `dest`, and the limit on its requests, while the context lasts."""
    with contextlib.closing(WorkList(dest, dest_options=live.dest_options)) as work:
        live.work, live.requests = work, RequestLimit(max_requests)
        try:
            yield work
        finally:
            live.work = None


def current_flow_run_id() -> str | None:
    """The id under which the server knows the flow run that this thread works for."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return str(context.flow_run.id) if context is not None and context.flow_run is not None else None


def load_options(reference: str | None) -> dict[str, Any]:
    """The JSON object that `block:NAME` or `env:NAME` refers to; None: no options.

    Raises:
        UsageError: another form, nothing of that name, or not a JSON object. Never quotes what it found.
    """
    if reference is None:
        return {}
    kind, _, name = reference.partition(":")
    if kind == "env" and name:
        value: Any = os.environ.get(name)
        if value is None:
            raise UsageError(f"storage options: no environment variable {name} on this worker")
    elif kind == "block" and name:
        value = _read_secret_block(name)
    else:
        # Not quoted: it may be the options themselves, which would be stored with the parameters.
        raise UsageError("storage options of a flow run are given as block:NAME or env:NAME, never by value")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise UsageError(f"storage options: {reference} does not hold a JSON object")
    return value


def _read_secret_block(name: str) -> Any:
    from prefect.blocks.system import Secret

    try:
        block = cast("Secret[Any]", Secret.load(name))
    except ValueError as error:
        raise UsageError(f"storage options: no Prefect Secret block named {name}") from error
    return block.get()
