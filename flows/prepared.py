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
from ptbin.catalog.plan import WIDTH, Plan
from ptbin.catalog.request import RunRequest
from ptbin.errors import PtbinError, StorageError, UsageError
from ptbin.history.failures import Ledger, read_ledger
from ptbin.runs.account import Account
from ptbin.runs.outcomes import Kind, Outcome
from ptbin.runs.remembering import CheckpointMemory
from ptbin.runs.tally import Tally
from ptbin.sources.leftovers import is_leftover, leftover_role
from ptbin.stores import identity_text
from tasks.live import LiveRun


def refuse_nothing(live: LiveRun, request: RunRequest) -> None:
    """Refuse a conversion of nothing before anything is written; the listing ends at the first candidate.

    Raises:
        UsageError: there is no checkpoint below SOURCE, nor any problem.
    """
    if request.named is not None or request.kind == "sync":
        return
    place, pattern = split_glob(request.source, live.sides.source_at)
    shown = (*request.include, pattern or "")
    entries = Entries(shown=shown, exclude=request.exclude, copy_links=request.copy_links)
    found = find_checkpoints(
        place,
        include=request.include,
        exclude=request.exclude,
        entries=entries,
        pattern=pattern,
    )
    if next(found, None) is None and not entries.problems:
        raise UsageError(nothing_below(request.source, entries, request.nothing))


@contextlib.contextmanager
def preparing(live: LiveRun, request: RunRequest, work_found: Callable[[], object]) -> Iterator[None]:
    """Make the run's plan, under the lease of DEST, as far as the stores allow.

    `work_found` is called at most once, as soon as there is something to convert: the listing may still take
    long.

    Raises:
        UsageError: there is nothing below SOURCE.
        DestinationBusyError: another run works on DEST.
    """
    with live.open_plan(request) as plan, contextlib.ExitStack() as stack:
        lease = acquire_lease(live.sides.dest_at(request.dest), live.run_id, lost=live.stop, tick=live.tick)
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
    try:
        return read_ledger(live.sides.dest_at(plan.request.dest), root=CheckpointMemory(plan).root)
    except PtbinError:
        return Ledger()


def _is_settled(job: Job, ledger: Ledger) -> bool:
    """Whether the file is not a checkpoint, by its name or by an earlier run that found it in this state."""
    if not job.copies and is_leftover(job.path):
        return True
    row = ledger.seen(job.source_uri, identity_text(job.identity))
    return row is not None and not row.is_failure


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
            write_segment(live.sides.dest_at(request.dest), f"{live.run_id}-0000", rows)
    tally = Tally.of(live.run_id, request, min_success)
    account = Account(plan, tally, CheckpointMemory(plan), began=live.began)
    refused = account.open()
    try:
        if (
            not account.remembers
            or not _settle_known(live, account)
            or plan.has_many_segments
            or (request.deletes and next(plan.iter_gone(live.tick), None) is not None)
        ):
            return None
    except PtbinError:
        return None
    if text := work.entries.links_words():
        live.listener.noted(text)
    for entry in refused:
        live.listener.settled(entry)
    account.count_untouched()
    live.listener.planned(0, 0, tally.count("up_to_date"))
    return account.close() | {"task_runs": 0}


def _settle_known(live: LiveRun, account: Account) -> bool:
    """Settle what is not a checkpoint, by name or by earlier runs; false where anything else is to do."""
    plan, ledger = account.plan, account.tally.ledger
    leftovers = []
    known = []
    for job in plan.work.iter_to_do():
        if job.copies or not _is_settled(job, ledger):
            return False
        row = ledger.seen(job.source_uri, identity_text(job.identity))
        if row is None:
            leftovers.append(job)
        else:
            known.append((job, Outcome(job.path, cast("Kind", row.outcome), detail=row.detail)))
    with ThreadPoolExecutor(WIDTH) as pool:
        # By their names optimizers and the like: a run looks into each, for it may hold a model after all.
        looked = pool.map(
            lambda job: is_convertible(live.sides.source_at(job.source_uri), plan.request.making),
            leftovers,
        )
        for job, converts in zip(leftovers, looked, strict=True):
            live.tick()
            if converts:
                return False
            role = leftover_role(job.path) or ""
            known.append((job, Outcome(job.path, "left_alone", detail=role)))
    for job, outcome in known:
        account.settle(job, outcome)
    return True
