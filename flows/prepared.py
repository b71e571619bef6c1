"""What the command line does before Prefect: it makes the run's plan, and ends a run that has nothing to do.

The plan is the flow's own (`ptbin.catalog.plan`, under the lease of DEST), and the flow goes on with it:
nothing is listed twice. A run with nothing to do leaves what every run leaves, its record, the index
and the list of what is not converted, and costs neither an import of Prefect nor a server.

Knows nothing of Prefect. What is to be retried (a store that fails) is left to the flow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from ptbin.catalog import Job, find_checkpoints
from ptbin.catalog.comparing import is_convertible
from ptbin.catalog.entries import Entries, nothing_below
from ptbin.catalog.finished import write_segment
from ptbin.catalog.globs import split_glob
from ptbin.catalog.lease import acquire_lease
from ptbin.catalog.plan import Plan
from ptbin.catalog.request import RunRequest
from ptbin.errors import PtbinError, StorageError, UsageError
from ptbin.history.failures import Ledger, write_unconverted
from ptbin.runs.ending import end_run
from ptbin.runs.outcomes import Kind, Outcome
from ptbin.runs.remembering import close_ledger, open_ledger
from ptbin.runs.tally import Tally
from ptbin.sources.companions import companion_of, is_companion
from ptbin.stores import identity_text
from tasks.live import LiveRun, Settled

__all__ = ["finish_in_step", "preparing", "refuse_nothing"]

WIDTH = 8
"""Manifests and companions are asked side by side: that is waiting for small answers."""


def refuse_nothing(live: LiveRun, request: RunRequest) -> None:
    """Refuse a conversion of nothing before anything is written; the listing ends at the first candidate.

    Raises:
        UsageError: there is no checkpoint below SOURCE, and no problem.
    """
    if request.named is not None or request.kind == "sync":
        return
    shown = (*request.include, split_glob(request.source, live.source_options)[1] or "")
    entries = Entries(shown=shown, exclude=request.exclude, copy_links=request.copy_links)
    found = find_checkpoints(
        request.source,
        include=request.include,
        exclude=request.exclude,
        storage_options=live.source_options,
        entries=entries,
    )
    if next(found, None) is None and not entries.problems:
        raise UsageError(nothing_below(request.source, entries, request.nothing))


@contextlib.contextmanager
def preparing(live: LiveRun, request: RunRequest, work_found: Callable[[], object]) -> Iterator[None]:
    """Make the run's plan, under the lease of DEST, so far as the stores allow it.

    `work_found` is called at most once, as soon as there is something to convert: the listing may still take
    long.

    Raises:
        UsageError: there is nothing below SOURCE.
        DestinationBusyError: another run works on DEST.
    """
    with live.open_plan(request) as plan, contextlib.ExitStack() as stack:
        lease = acquire_lease(live.dest_at(request.dest), live.run_id, lost=live.stop, tick=live.tick)
        stack.callback(lease.release)
        ledgers: list[Ledger] = []

        def found(job: Job) -> bool:
            if not ledgers:
                ledgers.append(_read_ledger(live, plan))
            if _is_settled(job, ledgers[0]):
                return False
            work_found()
            return True

        # Where the store fails the flow tries again, and says what is wrong.
        with contextlib.suppress(StorageError):
            plan.make(live.tick, on_new=found)
            plan.refuse_nothing()
        live.lease = lease
        yield


def _read_ledger(live: LiveRun, plan: Plan) -> Ledger:
    tally = _tally(live, plan.request)
    try:
        open_ledger(tally, plan)
    except PtbinError:
        return Ledger()
    return tally.ledger


def _tally(live: LiveRun, request: RunRequest, min_success: float | None = None) -> Tally:
    return Tally(live.run_id, request.source, request.dest, kind=request.kind, min_success=min_success)


def _is_settled(job: Job, ledger: Ledger) -> bool:
    """Whether an earlier run found in this very state of the file that it is no checkpoint."""
    if not job.copies and is_companion(job.path):
        return True
    row = ledger.before.get(job.source_uri)
    return row is not None and row.state == identity_text(job.identity) and not row.is_failure


def finish_in_step(live: LiveRun, min_success: float | None = None) -> dict[str, Any] | None:
    """The summary of the run, where the plan shows that nothing is to be done; None: the flow has work."""
    plan, lease = live.plan, live.lease
    if plan is None or not plan.is_made or lease is None or lease.follows_dead:
        return None
    request, work = plan.request, plan.work
    if request.compares or request.planning.force:
        return None
    rows = plan.settle_unknown(live.tick)
    if rows:  # also for the flow that may go on
        with contextlib.suppress(StorageError):
            write_segment(live.dest_at(request.dest), f"{live.run_id}-0000", rows)
    tally = _tally(live, request, min_success)
    try:
        open_ledger(tally, plan)
        alone = _settle_known(live, plan, tally)
        if (
            alone is None
            or plan.has_many_segments
            or (request.deletes and next(plan.iter_gone(live.tick), None) is not None)
        ):
            return None
    except PtbinError:
        return None
    tally.skipped.update(work.entries.counts)
    if text := work.entries.links_words():
        live.listener.noted(text)
    for problem, entry in zip(plan.problems, tally.add_collisions(plan.problems), strict=True):
        live.listener.settled(
            Settled(problem.source, entry.outcome, reason=problem.reason, detail=problem.detail)
        )
    tally.add_untouched(work)
    live.listener.planned(0, 0, tally.count("up_to_date"))
    return _leave(live, plan, tally, alone)


def _settle_known(live: LiveRun, plan: Plan, tally: Tally) -> set[str] | None:
    """Count what is no checkpoint, by its name or earlier runs; None where anything else is to be done."""
    companions = []
    alone = {}
    for job in plan.work.iter_to_do():
        if job.copies or not _is_settled(job, tally.ledger):
            return None
        row = tally.ledger.before.get(job.source_uri)
        if row is None or row.state != identity_text(job.identity):
            companions.append(job)
        else:
            kind = cast("Kind", row.outcome)
            alone[job.path] = (job, Outcome(job.path, kind, detail=row.detail))
    with ThreadPoolExecutor(WIDTH) as pool:
        # By their names optimizers and the like: a run looks into each, for it may hold a model after all.
        looked = pool.map(
            lambda job: is_convertible(live.source_at(job.source_uri), plan.request.making),
            companions,
        )
        for job, converts in zip(companions, looked, strict=True):
            live.tick()
            if converts:
                return None
            alone[job.path] = (job, Outcome(job.path, "left_alone", detail=_role(job)))
    for job, outcome in alone.values():
        tally.add(job, outcome)
    return set(alone)


def _role(job: Job) -> str:
    return companion_of(job.path.rpartition("/")[2]) or ""


def _leave(live: LiveRun, plan: Plan, tally: Tally, alone: set[str]) -> dict[str, Any]:
    """What every run leaves in DEST, and its summary."""
    request = plan.request
    ledger = close_ledger(tally, plan, alone)
    if ledger is not None:
        with contextlib.suppress(StorageError):
            write_unconverted(live.dest_at(request.dest), ledger)
    return end_run(
        tally,
        request.making,
        began=live.began,
        selection=request.selection(),
        source_options=live.source_options,
        dest_options=live.dest_options,
    ) | {"task_runs": 0}
