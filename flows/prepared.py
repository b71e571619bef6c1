"""What the command line does before Prefect: it makes the run's plan, and ends a run that has nothing to do.

The plan is the flow's own (`WorkList.plan`, the same options, under the lease of DEST), and the flow goes on
with it: nothing is listed twice. A run with nothing to do leaves what every run leaves, its record, the index
and the list of what is not converted, and costs neither an import of Prefect nor a server.

Knows nothing of Prefect. What is to be retried (a store that fails) is left to the flow.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from flows.remembering import close_ledger, open_ledger
from flows.run_history import facts_of_run
from flows.run_record import record_files, record_folder
from flows.selection import Selection
from flows.tally import Tally
from ptbin.catalog import Job, OutputRule, Problem, find_checkpoints
from ptbin.catalog.companions import copied_along
from ptbin.catalog.comparing import is_convertible
from ptbin.catalog.entries import Entries, nothing_below
from ptbin.catalog.finished import FinishedRow, read_finished, write_segment
from ptbin.catalog.globs import split_glob
from ptbin.catalog.lease import acquire_lease
from ptbin.catalog.mirroring import iter_gone
from ptbin.catalog.named import NamedFiles
from ptbin.catalog.worklist import WorkList
from ptbin.errors import PtbinError, StorageError, UsageError
from ptbin.history.failures import Ledger, write_unconverted
from ptbin.options import ConvertOptions
from ptbin.sources.companions import companion_of, is_companion
from ptbin.stores import identity_text
from tasks.live import LiveRun, Settled
from tasks.outcomes import Kind, Outcome, one_line

__all__ = ["Asked", "finish_in_step", "preparing", "refuse_nothing"]

WIDTH = 8
"""Manifests and companions are asked side by side: that is waiting for small answers."""
ASKED_AT_ONCE = 500
MERGED_SEGMENTS = 16
"""With that many segments of the index the flow is to merge them."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a run is asked for, as far as its plan depends on it.

    Attributes:
        copied: of a mirror, the globs of what else goes along; None for a conversion.
        named: the paths that alone are looked at; `must_exist`: one that is not there is a problem.
        always: there is work whatever the plan says (`--force`, `--checksum`).
    """

    source: str
    dest: str
    rule: OutputRule
    options: ConvertOptions
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    copy_links: bool = False
    copied: tuple[str, ...] | None = None
    named: Sequence[str] | None = None
    must_exist: bool = True
    deletes: bool = False
    distrust: bool = False
    always: bool = False
    min_success: float | None = None

    @property
    def kind(self) -> str:
        """Of the run."""
        return "convert" if self.copied is None else "sync"

    @property
    def selection(self) -> Selection:
        """As the record says it."""
        if self.copied is not None:
            return Selection(exclude=self.exclude, copied=self.copied, copy_links=self.copy_links)
        return Selection(
            self.include, self.exclude, is_listed=self.named is not None, copy_links=self.copy_links
        )


def refuse_nothing(live: LiveRun, asked: Asked) -> None:
    """Refuse a conversion of nothing before anything is written; the listing ends at the first candidate.

    Raises:
        UsageError: there is no checkpoint below SOURCE, and no problem.
    """
    if asked.named is not None or asked.copied is not None:
        return
    shown = (*asked.include, split_glob(asked.source, live.source_options)[1] or "")
    entries = Entries(shown=shown, exclude=asked.exclude, copy_links=asked.copy_links)
    found = find_checkpoints(
        asked.source,
        include=asked.include,
        exclude=asked.exclude,
        storage_options=live.source_options,
        entries=entries,
    )
    if next(found, None) is None and not entries.problems:
        raise UsageError(nothing_below(asked.source, entries))


@contextlib.contextmanager
def preparing(live: LiveRun, asked: Asked, work_found: Callable[[], object]) -> Iterator[bool]:
    """Plan the run into `live`, under the lease of DEST; whether it could be planned.

    `work_found` is called at most once, as soon as there is something to convert: the listing may still take
    long.

    Raises:
        UsageError: there is nothing below SOURCE.
        DestinationBusyError: another run works on DEST.
    """
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(contextlib.closing(WorkList(asked.dest, dest_options=live.dest_options)))
        stack.callback(setattr, live, "work", None)
        lease = acquire_lease(live.dest_at(asked.dest), live.run_id, lost=live.stop, tick=live.tick)
        stack.callback(lease.release)
        try:
            problems = _plan(live, asked, work, work_found)
        except StorageError:
            yield False  # the flow tries again, and says what is wrong
            return
        live.work, live.planned, live.lease = work, problems, lease
        yield True


def _plan(live: LiveRun, asked: Asked, work: WorkList, work_found: Callable[[], object]) -> list[Problem]:
    files = NamedFiles(asked.named) if asked.named is not None else None
    ledgers: list[Ledger] = []

    def found(job: Job) -> bool:
        if not ledgers:
            ledgers.append(_read_ledger(live, asked, work))
        if _is_settled(job, ledgers[0]):
            return False
        work_found()
        return True

    problems = work.plan(
        asked.source,
        asked.rule,
        asked.options,
        include=asked.include,
        exclude=asked.exclude,
        source_options=live.source_options,
        tick=live.tick,
        copies=copied_along(asked.copied) if asked.copied is not None else None,
        distrust=asked.distrust,
        named=files,
        copy_links=asked.copy_links,
        on_new=found,
    )
    if files is not None and asked.must_exist:
        problems += files.missing(asked.source)
    if files is None and not problems and not work.count():
        what = "no checkpoints to convert" if asked.copied is None else "nothing to mirror"
        raise UsageError(nothing_below(asked.source, work.entries, what))
    return problems


def _read_ledger(live: LiveRun, asked: Asked, work: WorkList) -> Ledger:
    tally = _tally(live, asked)
    try:
        open_ledger(tally, work, source_options=live.source_options, dest_options=live.dest_options)
    except PtbinError:
        return Ledger()
    return tally.ledger


def _tally(live: LiveRun, asked: Asked) -> Tally:
    return Tally(live.run_id, asked.source, asked.dest, kind=asked.kind, min_success=asked.min_success)


def _is_settled(job: Job, ledger: Ledger) -> bool:
    """Whether an earlier run found in this very state of the file that it is no checkpoint."""
    if not job.copies and is_companion(job.path):
        return True
    row = ledger.before.get(job.source_uri)
    return row is not None and row.state == identity_text(job.identity) and not row.is_failure


def finish_in_step(live: LiveRun, asked: Asked) -> dict[str, Any] | None:
    """The summary of the run, where the plan shows that nothing is to be done; None: the flow has work."""
    work, problems, lease = live.work, live.planned, live.lease
    if work is None or problems is None or lease is None or lease.follows_dead or asked.always:
        return None
    live.tick()
    _ask(live, asked, work)
    tally = _tally(live, asked)
    try:
        open_ledger(tally, work, source_options=live.source_options, dest_options=live.dest_options)
        alone = _settle_known(live, asked, work, tally)
        if (
            alone is None
            or len(work.segments()) >= MERGED_SEGMENTS
            or (asked.deletes and _is_gone(live, asked))
        ):
            return None
    except PtbinError:
        return None
    tally.skipped.update(work.entries.counts)
    if text := work.entries.links_words():
        live.listener.noted(text)
    for problem, entry in zip(problems, tally.add_collisions(problems), strict=True):
        live.listener.settled(
            Settled(problem.source, entry.outcome, reason=problem.reason, detail=problem.detail)
        )
    tally.add_all(work.iter_current(), "up_to_date")
    for job in work.iter_left_alone():
        tally.add(
            job, Outcome(job.path, "left_alone", detail=companion_of(job.path.rpartition("/")[2]) or "")
        )
    live.listener.planned(0, 0, tally.count("up_to_date"))
    return _leave(live, asked, work, tally, alone)


def _ask(live: LiveRun, asked: Asked, work: WorkList) -> None:
    """Settle what the index of finished work does not know: a read each."""
    rows: list[FinishedRow] = []

    def read(job: Job) -> FinishedRow | None:
        try:
            return read_finished(
                job,
                work.relative_manifest(job),
                asked.options,
                source_options=live.source_options,
                dest_options=live.dest_options,
            )
        except PtbinError:
            return None  # the conversion will meet the same problem and report it

    left = work.iter_to_ask()
    with ThreadPoolExecutor(WIDTH) as pool:
        while jobs := list(islice(left, ASKED_AT_ONCE)):
            live.tick()
            answers = [row for row in pool.map(read, jobs) if row is not None]
            rows += work.answer(jobs, answers, asked.options)
    if rows:  # also for the flow that may go on
        with contextlib.suppress(StorageError):
            write_segment(live.dest_at(asked.dest), f"{live.run_id}-0000", rows)


def _settle_known(live: LiveRun, asked: Asked, work: WorkList, tally: Tally) -> set[str] | None:
    """Count what is no checkpoint, by its name or earlier runs; None where anything else is to be done."""
    companions = []
    alone = {}
    for job in work.iter_to_do():
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
            lambda job: is_convertible(live.source_at(job.source_uri), asked.options),
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


def _is_gone(live: LiveRun, asked: Asked) -> bool:
    """Whether DEST holds anything that a mirror with deletions would look at."""
    assert live.work is not None
    gone = iter_gone(
        live.work,
        asked.source,
        exclude=asked.exclude,
        source_options=live.source_options,
        tick=live.tick,
    )
    return next(gone, None) is not None


def _leave(live: LiveRun, asked: Asked, work: WorkList, tally: Tally, alone: set[str]) -> dict[str, Any]:
    """What every run leaves in DEST, and its summary."""
    ledger = close_ledger(tally, work, asked.selection, alone)
    if ledger is not None:
        with contextlib.suppress(StorageError):
            write_unconverted(live.dest_at(asked.dest), ledger)
    seconds = time.monotonic() - live.began
    summary = tally.summary(seconds) | ({"deleted_paths": []} if asked.kind == "sync" else {})
    folder = record_folder(tally.place, tally.run_id)
    files = record_files(
        tally,
        summary,
        options=asked.options.to_json() | {"verify": asked.options.verify},
        flow_run_id=None,
        selection=asked.selection.to_json(work.rule),
        facts=facts_of_run(tally, source_options=live.source_options, dest_options=live.dest_options),
    )
    try:
        for name, data in files.items():
            (live.dest_at(folder) / name).write_bytes(data)
    except StorageError as error:
        tally.run_problems.append(Problem(folder, error.reason, one_line(f"run record: {error}")))
        summary = tally.summary(seconds) | ({"deleted_paths": []} if asked.kind == "sync" else {})
        folder = ""
    return summary | {
        "message": tally.message(),
        "record": folder,
        "succeeded": tally.succeeded,
        "interrupted": False,
        "task_runs": 0,
    }
