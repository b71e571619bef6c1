"""A whole store in threads of this process: the plan, the record and the history of a flow, without Prefect.

What Prefect adds is not here: other runners, deadlines, retries on a server that can be watched. A run killed
at any instant leaves what a killed flow leaves; the next run, of either kind, goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

from ptbin.catalog.checks import check_call
from ptbin.catalog.finished import FinishedRow, write_segment
from ptbin.catalog.jobs import Job, Problem
from ptbin.catalog.lease import acquire_lease
from ptbin.catalog.plan import Plan
from ptbin.catalog.request import RunRequest
from ptbin.cores import available_cores
from ptbin.errors import PtbinError, StorageError, UsageError
from ptbin.history.failures import write_unconverted
from ptbin.options import ConvertOptions, Naming
from ptbin.runs.ending import end_run
from ptbin.runs.outcomes import Outcome, one_line, outcome_of_error
from ptbin.runs.record import check_run_id, new_run_id
from ptbin.runs.remembering import close_ledger, open_ledger
from ptbin.runs.result import RunResult
from ptbin.runs.retrying import RETRIES, retry_delay
from ptbin.runs.steps import publish_job, stage_job
from ptbin.runs.tally import Tally
from ptbin.stores import place_of

__all__ = ["convert_directory"]

MAX_DEFAULT_WORKERS = 16
FULL_AFTER = 3
"""After that many failures for want of room the run ends: each of the rest would be read whole to fail so."""
JOBS_AT_ONCE = 1000
SEGMENT_ROWS = 5_000

Progress = Callable[[int], None]


class _Stopped(BaseException):
    """Raised in the engine's progress callback once the run is to end. Not an `Exception`, and no outcome."""


def convert_directory(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    options: ConvertOptions | None = None,
    *,
    naming: Naming = "replace",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    copy_links: bool = False,
    files: Iterable[str] | None = None,
    min_success: float | None = None,
    workers: int | None = None,
    run_id: str | None = None,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Convert every checkpoint below `source` into `dest`, as `ptbin convert` does, without Prefect.

    The plan is that of the command and its flow, and so are outputs, manifests, record and history: a rerun
    converts only what is new or changed. One checkpoint's fault never stops the others; it is a problem of
    the result. An interrupt ends the run, which leaves its record first.

    Args:
        source: a directory, a prefix, a glob or one checkpoint: a path or any fsspec URL.
        include, exclude: globs on paths below `source`. `files`: only these paths below it.
        min_success: the run succeeds if that share of its checkpoints does.
        workers: checkpoints worked on at once; left out, one a core, 2 to 16.
        source_options, dest_options: fsspec storage options; they are written nowhere.
        progress: called with the bytes moved since its last call, from several threads.

    Raises:
        UsageError: the call cannot work, or there is nothing below `source`; nothing was written.
        DestinationBusyError: another run works on `dest`.
        StorageError: a store failed while it was listed.
    """
    check_run_id(run_id := run_id or new_run_id())
    request = RunRequest(
        os.fspath(source),
        os.fspath(dest),
        options or ConvertOptions(),
        naming=naming,
        include=tuple(include),
        exclude=tuple(exclude),
        copy_links=copy_links,
        named=tuple(files) if files is not None else None,
    )
    sides: dict[str, Any] = {"source_options": source_options, "dest_options": dest_options}
    check_call(request.source, request.dest, **sides)
    with contextlib.closing(Plan(request, **sides)) as plan:
        run = _Run(plan, run_id, progress, min_success)
        lease = acquire_lease(place_of(request.dest, dest_options), run_id, lost=run.stop, tick=run.tick)
        try:
            plan.make(run.tick)
            plan.refuse_nothing()
            if lease.follows_dead:
                with contextlib.suppress(StorageError):
                    plan.work.discard_unfinished()
            return run.carry_out(workers or min(max(available_cores(), 2), MAX_DEFAULT_WORKERS))
        finally:
            lease.release()


class _Run:
    """A conversion under way in threads."""

    def __init__(self, plan: Plan, run_id: str, progress: Progress | None, min_success: float | None) -> None:
        self.began = time.monotonic()
        self.plan, self.work, self.request = plan, plan.work, plan.request
        self.tally = Tally(run_id, self.request.source, self.request.dest, min_success=min_success)
        self.stopping = threading.Event()
        self.reason = ""
        self._progress = progress
        self._settled: set[str] = set()
        self._rows: list[FinishedRow] = []
        self._segments = 0
        self._full = 0

    def stop(self, reason: str) -> None:
        """Begin nothing new, and give up what is under way."""
        self.reason = self.reason or reason
        self.stopping.set()

    def moved(self, nbytes: int) -> None:
        if self.stopping.is_set():
            raise _Stopped
        if self._progress is not None:
            self._progress(nbytes)

    def tick(self) -> None:
        if self.stopping.is_set():
            raise UsageError(f"the run was stopped: {self.reason}")

    # -- the work ------------------------------------------------------------------------------------

    def carry_out(self, workers: int) -> RunResult:
        """Convert, and account for every end."""
        remembers = self._open_ledger()
        self.tally.skipped.update(self.work.entries.counts)
        self.tally.add_collisions(self.plan.problems)
        try:
            self._remember(self.plan.settle_unknown(self.tick))
            self.tally.add_untouched(self.work)
            self._convert_all(workers)
        except BaseException as error:
            self.tally.interrupted = not isinstance(error, Exception)
            if isinstance(error, Exception):
                detail = one_line(f"{type(error).__name__}: {error}")
                self.tally.run_problems.append(Problem(self.request.dest, _reason_of(error), detail))
            self.stopping.set()
            self._finish(remembers=remembers)
            raise
        return self._finish(remembers=remembers)

    def _convert_all(self, workers: int) -> None:
        with ThreadPoolExecutor(workers, thread_name_prefix="ptbin-convert") as pool:
            left = self.work.iter_to_do()
            try:
                while jobs := list(islice(left, JOBS_AT_ONCE)):
                    again = [job for job, outcome in self._results(pool, jobs) if self._settle(job, outcome)]
                    for retry in range(1, RETRIES + 1):
                        if not again or self.stopping.wait(retry_delay(retry)):
                            break
                        last = retry == RETRIES
                        results = self._results(pool, again)
                        again = [job for job, outcome in results if self._settle(job, outcome, last=last)]
            except BaseException:
                self.stopping.set()  # what is under way ends by its progress
                raise

    def _results(self, pool: ThreadPoolExecutor, jobs: Sequence[Job]) -> Iterable[tuple[Job, Outcome]]:
        return zip(jobs, pool.map(self._convert, jobs), strict=True)

    def _convert(self, job: Job) -> Outcome:
        began = time.monotonic()
        sides = self.plan.sides
        try:
            self.moved(0)
            outcome = stage_job(
                job, self.request.making, run_id=self.tally.run_id, progress=self.moved, **sides
            )
            if outcome.draft is not None:
                outcome = publish_job(job, outcome.draft, progress=self.moved, **sides)
        except _Stopped:
            return Outcome(job.path, "not_tried")
        except Exception as error:  # noqa: BLE001 - what is wrong with one must not stop the others
            outcome = outcome_of_error(job.path, error)
        return replace(outcome, seconds=time.monotonic() - began)

    # -- the account ---------------------------------------------------------------------------------

    def _settle(self, job: Job, outcome: Outcome, *, last: bool = False) -> bool:
        """Whether the job is to be tried again; else it has its final outcome."""
        if outcome.kind == "not_tried":
            return False  # `_finish` counts it
        if outcome.transient and not last:
            return True
        self._full += outcome.is_full
        if self._full >= FULL_AFTER:
            self.stop("there is no room left in DEST; free some, then run again")
        self._settled.add(job.path)
        self.tally.add(job, outcome)
        facts = outcome.converted
        if facts is not None and facts.index_row is not None:
            self._remember([replace(facts.index_row, manifest=self.work.relative_manifest(job))])
        return False

    def _open_ledger(self) -> bool:
        try:
            open_ledger(self.tally, self.plan)
        except PtbinError as error:
            problem = Problem(self.request.dest, error.reason, one_line(str(error)))
            self.tally.run_problems.append(problem)
            return False
        return True

    def _remember(self, rows: Iterable[FinishedRow]) -> None:
        self._rows.extend(rows)
        if len(self._rows) >= SEGMENT_ROWS:
            self._write_index()

    def _write_index(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self._segments += 1
            dest = place_of(self.request.dest, self.plan.sides["dest_options"])
            with contextlib.suppress(StorageError):  # it only spares reading manifests
                write_segment(dest, f"{self.tally.run_id}-{self._segments:04d}", rows)

    def _finish(self, *, remembers: bool) -> RunResult:
        """Leave the index, what is not converted, and the record."""
        tally, sides = self.tally, self.plan.sides
        tally.add_rest(self.work, self._settled)
        if self.reason:
            tally.run_problems.append(Problem(tally.dest, "run_stopped", self.reason))
        self._write_index()
        if not self.stopping.is_set():
            with contextlib.suppress(StorageError):
                self.plan.merge_index(f"{tally.run_id}-merged")
        if remembers and (rows := close_ledger(tally, self.plan, self._settled)) is not None:
            with contextlib.suppress(StorageError):
                write_unconverted(place_of(tally.dest, sides["dest_options"]), rows)
        selection = self.request.selection() if remembers else None
        summary = end_run(tally, self.request.making, began=self.began, selection=selection, **sides)
        return RunResult.of(tally.kind, summary)


def _reason_of(error: Exception) -> str:
    return error.reason if isinstance(error, PtbinError) else "internal_error"
