"""A whole store in threads of this process: the plan, the record and the history of a flow, without Prefect.

What Prefect adds is not here: other runners, deadlines, retries on a server that can be watched. A run killed
at any instant leaves what a killed flow leaves; the next run, of either kind, goes on from there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

from ptbin.catalog.checks import check_request
from ptbin.catalog.jobs import Job
from ptbin.catalog.lease import acquire_lease
from ptbin.catalog.plan import Plan
from ptbin.catalog.request import RunRequest
from ptbin.cores import default_workers
from ptbin.errors import StorageError, UsageError
from ptbin.options import ConvertOptions, Naming, given, refuse_text
from ptbin.runs.account import FULL, Account
from ptbin.runs.outcomes import Outcome, outcome_of_error
from ptbin.runs.remembering import CheckpointMemory
from ptbin.runs.result import RunResult
from ptbin.runs.retrying import RETRIES, retry_delay
from ptbin.runs.run_ids import check_run_id, new_run_id
from ptbin.runs.steps import publish_job, stage_job
from ptbin.runs.tally import Tally
from ptbin.stores import Sides, Where
from ptbin.stores.place import apart

JOBS_AT_ONCE = 1000

Progress = Callable[[int], None]


class _Stopped(BaseException):
    """Raised in the engine's progress callback once the run is to end. Not an `Exception`, and no outcome."""


def convert_directory(
    source: Where,
    dest: Where,
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
        source: a directory, a prefix, a glob or one checkpoint: a path, any fsspec URL, or a `Place`.
        include: only paths below `source` that match one of these globs.
        exclude: not those that match one of these.
        files: only these paths below `source`.
        min_success: the run succeeds if that share of its checkpoints does.
        workers: checkpoints worked on at once; left out, one a core, 2 to 16.
        source_options: fsspec storage options for `source`; they are written nowhere.
        dest_options: the same for `dest`.
        progress: called with the bytes moved since its last call, from several threads.

    Raises:
        UsageError: the call cannot work, or there is nothing below `source`; nothing was written.
        DestinationBusyError: another run works on `dest`.
        StorageError: a store failed while it was listed.
    """
    refuse_text(include=include, exclude=exclude, files=files)
    check_run_id(run_id := run_id or new_run_id())
    (source, source_options), (dest, dest_options) = apart(source, source_options), apart(dest, dest_options)
    request = RunRequest(
        source,
        dest,
        given(options, ConvertOptions),
        naming=naming,
        include=tuple(include),
        exclude=tuple(exclude),
        copy_links=copy_links,
        named=tuple(files) if files is not None else None,
    )
    sides = Sides(source_options, dest_options)
    check_request(request, sides)
    with contextlib.closing(Plan(request, sides)) as plan:
        run = _Run(plan, run_id, progress, min_success)
        lease = acquire_lease(plan.work.dest, run_id, lost=run.stop, tick=run.tick)
        try:
            plan.make(run.tick)
            plan.refuse_nothing()
            if lease.follows_dead:
                with contextlib.suppress(StorageError):
                    plan.work.discard_unfinished()
            return run.carry_out(workers or default_workers())
        finally:
            lease.release()


class _Run:
    """A conversion under way in threads."""

    def __init__(self, plan: Plan, run_id: str, progress: Progress | None, min_success: float | None) -> None:
        self.plan, self.work, self.request = plan, plan.work, plan.request
        self.tally = Tally.of(run_id, self.request, min_success)
        self.account = Account(plan, self.tally, CheckpointMemory(plan), began=time.monotonic())
        self.stopping = threading.Event()
        self.reason = ""
        self._progress = progress

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

    def carry_out(self, workers: int) -> RunResult:
        """Convert, and account for every end."""
        self.account.open()
        try:
            self.account.remember(self.plan.settle_unknown(self.tick))
            self.account.count_untouched()
            self._convert_all(workers)
        except BaseException as error:
            self.tally.interrupted = not isinstance(error, Exception)
            if isinstance(error, Exception):
                self.tally.add_run_error(error)
            self.stopping.set()
            self._finish()
            raise
        return self._finish()

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
            run_id, making = self.tally.run_id, self.request.making
            outcome = stage_job(job, making, sides, run_id=run_id, progress=self.moved)
            if outcome.draft is not None:
                outcome = publish_job(job, outcome.draft, sides, progress=self.moved)
        except _Stopped:
            return Outcome(job.path, "not_tried")
        except Exception as error:  # noqa: BLE001 - what is wrong with one must not stop the others
            outcome = outcome_of_error(job.path, error)
        return replace(outcome, seconds=time.monotonic() - began)

    def _settle(self, job: Job, outcome: Outcome, *, last: bool = False) -> bool:
        """Whether the job is to be tried again; else it has its final outcome."""
        if outcome.kind == "not_tried":
            return False  # `_finish` counts it
        if outcome.transient and not last:
            return True
        self.account.settle(job, outcome)
        if self.account.is_full:
            self.stop(FULL)
        return False

    def _finish(self) -> RunResult:
        """Count what is left; leave the index, what is not converted, and the record."""
        self.account.count_rest()
        summary = self.account.close(stopped=self.reason, merges=not self.stopping.is_set())
        return RunResult.of(self.tally.kind, summary)
