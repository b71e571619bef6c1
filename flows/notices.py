"""What a run leaves for people who do not watch it: tags, the message of its state, the end of its log.

Automations match the tag `ptbin`, and take the state's message as it is: the counts in its first line, then
what failed, new failures first, then where the report is. So whatever a team makes of it, in Prefect's own
templates, needs no more than `flow_run.state.message`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.prefect.undocumented import flow_run_context
from ptbin.errors import short_detail
from ptbin.runs.outcomes import Outcome, one_line
from ptbin.runs.result import RunFailedError, RunResult
from tasks.batches import MAX_LINE_LENGTH, MAX_LISTED_FAILURES, first_failures

TAG = "ptbin"
"""Of every flow run; `deployments/automations/` match it."""


def failure_line(entry: Outcome) -> str:
    """`new: run3/cut.pt: corrupt_archive: ...`, or `since 2026-11-01: ...`; one line."""
    when = "new" if entry.age == "new" else f"since {entry.age}" if entry.age else entry.kind
    text = f"{when}: {entry.path}: {entry.reason}: {short_detail(entry.path, entry.detail)}"
    return one_line(text, MAX_LINE_LENGTH)


def state_message(counts: str, failures: Sequence[str], report: str | None = None) -> str:
    """The message of a run's final state: counts, failures as `failure_line` writes them, the report."""
    lines = [counts, *first_failures(failures)]
    if failures and report:
        lines.append(f"report: {report}")
    return "\n".join(lines)


def _log_failures(logger: logging.Logger | logging.LoggerAdapter[Any], failures: Sequence[str]) -> None:
    """The list of what failed as the last words of a run's log: one record, however many there are."""
    if failures:
        shown = failures[: 10 * MAX_LISTED_FAILURES]
        more = (
            f"\nand {len(failures) - len(shown):,} more, in the report" if len(failures) > len(shown) else ""
        )
        logger.error("%d failed:\n%s%s", len(failures), "\n".join(shown), more)


def tag_flow_run() -> None:
    """Give this thread's flow run its tag. Costs a request for a run that lacks it.

    Deployments and the command line give them when they make the run, as automations want it: the server
    keeps the tags for its events for some minutes as they were then. This is for flows that people call.
    The run goes on where the server does not answer.
    """
    from prefect.client.orchestration import get_client

    context = flow_run_context()
    if context is None or context.flow_run is None or TAG in context.flow_run.tags:
        return
    wanted = [*context.flow_run.tags, TAG]
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, tags=wanted)
    except Exception as error:  # noqa: BLE001 - whatever Prefect's client raises
        logging.getLogger(__name__).warning("the run has no tag %s: %s", TAG, type(error).__name__)
        return
    context.flow_run.tags = wanted  # for the events that this process sends


def final_state(
    result: RunResult, counts: str, failures: Sequence[str], report: str | None = None
) -> State[Any]:
    """Log what failed, and make the state that a flow returns; its caller gets the `RunResult` of it.

    Prefect returns a completed run's data to the caller and raises a failed run's, which has to be an
    exception: `RunFailedError` holds the same result.
    """
    _log_failures(get_run_logger(), failures)
    message = state_message(counts, failures, report)
    if result.succeeded:
        return Completed(data=result, message=message)
    return Failed(data=RunFailedError(result), message=message)
