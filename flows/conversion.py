"""A conversion under way, inside the convert flow: batches out, final states in, outcomes into the tally.

A batch that was written is proven next, before new batches begin. What a store may do better later comes
back in a batch of its own, at most `RETRIES` times, after a growing delay. A task run that ended in any
other state than Completed (which no checkpoint can cause) fails its own batch only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed

from flows.access import current_flow_run_id
from flows.artifacts import conversion_rows, publish_table
from flows.batches import cut, iter_batches
from flows.fanout import Work, fan_out, unexamined
from flows.run_record import record_files, record_folder
from flows.tally import Tally
from flows.units import format_nbytes
from ptbin.catalog import Job, Problem
from ptbin.catalog.finished import FinishedRow
from ptbin.errors import StorageError
from ptbin.options import ConvertOptions
from tasks.converting import convert_batch, verify_batch
from tasks.listing import find_up_to_date, work_of
from tasks.live import LiveRun
from tasks.outcomes import Outcome, one_line
from tasks.recording import merge_index, write_index, write_run_record
from tasks.retrying import RETRIES, retry_delay

__all__ = ["Conversion"]

ARTIFACT_KEY = "ptbin-convert"
SEGMENT_ROWS = 5_000
MERGED_SEGMENTS = 16
"""Where a run finds so many segments of the index, it puts one in their place."""
ASKING_COUNT = 200
ASKING_WIDTH = 8
"""At least so many ask what is up to date: that is waiting for small answers, not work."""


class Conversion:
    """One run: submits batches, turns final states into outcomes, keeps the tally."""

    def __init__(
        self, live: LiveRun, options: ConvertOptions, tally: Tally, workers: int, fail_fast: bool
    ) -> None:
        self.live = live
        self.work = work_of(live)
        self.settled = 0
        self.index_rows: list[FinishedRow] = []
        self.segments = 0
        self.options = options
        self.tally = tally
        self.workers = workers
        self.fail_fast = fail_fast
        self.logger = get_run_logger()
        self.task_runs = 1  # the listing

    def refuse(self, collisions: Sequence[Problem]) -> None:
        """Several sources of one output: none of them is converted."""
        self.tally.add_collisions(collisions)
        for problem in collisions:
            self._announce(problem.source, "rejected", problem.reason, problem.detail)

    def drop_up_to_date(self) -> None:
        """Ask the manifests that the index of finished work does not know; those reads are fanned out."""

        def ask(part: Sequence[Job]) -> Work:
            label = f"{len(part)} outputs"

            def hear(state: State[Any]) -> Iterable[Work]:
                rows = state.result() if state.is_completed() else []
                self._remember(self.work.answer(part, rows, self.options))
                return ()

            return Work(lambda: find_up_to_date.submit(self.live.run_id, label, unexamined(part)), hear)

        parts = cut(self.work.iter_to_ask(), self.work.count_to_ask(), ASKING_COUNT)
        self.task_runs += fan_out(map(ask, parts), width=max(self.workers, ASKING_WIDTH))

    def run(self) -> None:
        """Convert and prove what is to be done; every checkpoint is in the tally afterwards."""
        self.tally.add_all(self.work.iter_current(), "up_to_date")
        up_to_date = self.tally.count("up_to_date")
        count, nbytes = self.work.to_do()
        self.live.listener.planned(count, nbytes, up_to_date)
        self.logger.info(
            "%d checkpoints (%s) to convert, %d up to date", count, format_nbytes(nbytes), up_to_date
        )
        batches = iter_batches(
            self.work.iter_to_do(), count, nbytes, nbytes=lambda job: job.source_size, workers=self.workers
        )
        self.task_runs += fan_out(
            (self._convert(batch) for batch in batches),
            width=self.workers,
            keep_on=lambda: not (self.fail_fast and self.tally.has_problems),
        )
        if self.settled < count:
            settled = {entry.path for entry in self.tally.entries}
            left = (job for job in self.work.iter_to_do() if job.path not in settled)
            self.tally.add_all(left, "not_tried")

    def _remember(self, rows: Iterable[FinishedRow]) -> None:
        """For the index of finished work, written every so often: a run may be killed before its end."""
        self.index_rows.extend(rows)
        if len(self.index_rows) >= SEGMENT_ROWS:
            self._write_index()

    def _write_index(self) -> None:
        rows, self.index_rows = self.index_rows, []
        if not rows:
            return
        self.segments += 1
        self.task_runs += 1
        name = f"{self.tally.run_id}-{self.segments:04d}"
        try:
            write_index(self.live.run_id, self.tally.dest, name, unexamined(rows))
        except StorageError as error:
            self.logger.warning("index of finished work: %s", one_line(str(error)))

    def _merge_index(self) -> None:
        if len(self.work.segments()) < MERGED_SEGMENTS:
            return
        self.task_runs += 1
        try:
            merge_index(self.live.run_id, self.tally.dest, f"{self.tally.run_id}-merged")
        except StorageError as error:
            self.logger.warning("index of finished work: %s", one_line(str(error)))

    def finish(self, seconds: float) -> State[Any]:
        """Leave the index, the run record and the table; the state says how it went."""
        self._write_index()
        self._merge_index()
        tally = self.tally
        flow_run_id = current_flow_run_id()
        summary = tally.summary(seconds)
        options = self.options.to_json() | {"verify": self.options.verify}
        folder = record_folder(tally.dest, tally.run_id)
        files = record_files(tally, summary, options=options, flow_run_id=flow_run_id)
        try:
            write_run_record(self.live.run_id, folder, unexamined(files))
        except StorageError as error:
            # What was converted stays converted: a rerun finds it by its manifests, not by this record.
            tally.run_problems.append(Problem(folder, error.reason, one_line(f"run record: {error}")))
            summary = tally.summary(seconds)
            folder = ""
        message = tally.message()
        publish_table(
            ARTIFACT_KEY,
            conversion_rows(tally.entries),
            f"**{message}** in {seconds:.1f} s\n\n"
            f"from `{tally.source}` to `{tally.dest}`, run record `{folder}`",
        )
        self.live.summary.update(
            summary,
            message=message,
            record=folder,
            succeeded=tally.succeeded,
            task_runs=self.task_runs + 1,  # the run record
        )
        return (Completed if tally.succeeded else Failed)(message=message)

    def _convert(self, jobs: Sequence[Job], retry: int = 0) -> Work:
        label = self._label(jobs, retry)

        def submit() -> PrefectFuture[Any]:
            return convert_batch.submit(self.live.run_id, label, unexamined(jobs), unexamined(self.options))

        def then(state: State[Any]) -> Iterable[Work]:
            staged, again = self._collect(jobs, state, retry)
            if again:
                yield self._convert(again, retry + 1)
            if staged:
                by_path = {job.path: job for job in jobs}
                pairs = [(by_path[outcome.path], outcome.draft or "") for outcome in staged]
                yield self._verify([job for job, _ in pairs], [draft for _, draft in pairs])

        return Work(submit, then, delay=retry_delay(retry) if retry else 0.0)

    def _verify(self, jobs: Sequence[Job], drafts: Sequence[str], retry: int = 0) -> Work:
        label = self._label(jobs, retry)

        def submit() -> PrefectFuture[Any]:
            return verify_batch.submit(self.live.run_id, label, unexamined(jobs), unexamined(drafts))

        def then(state: State[Any]) -> Iterable[Work]:
            _, again = self._collect(jobs, state, retry)
            if again:
                draft_of = dict(zip((job.path for job in jobs), drafts, strict=True))
                yield self._verify(again, [draft_of[job.path] for job in again], retry + 1)

        return Work(submit, then, urgent=True, delay=retry_delay(retry) if retry else 0.0)

    def _collect(self, jobs: Sequence[Job], state: State[Any], retry: int) -> tuple[list[Outcome], list[Job]]:
        """Settle what is final; return what is to be proven and what is to be tried again."""
        if state.is_completed():
            outcomes: list[Outcome] = state.result()
        else:
            detail = one_line(f"the task run ended {state.name}: {state.message}")
            outcomes = [Outcome(job.path, "failed", "internal_error", detail) for job in jobs]
        staged, again = [], []
        for job, outcome in zip(jobs, outcomes, strict=True):
            if outcome.kind == "staged":
                staged.append(outcome)
            elif outcome.transient and retry < RETRIES:
                again.append(job)
                self.logger.info("%s will be tried again: %s", job.path, outcome.detail)
            else:
                self.settled += 1
                self.tally.add(job, outcome)
                if outcome.converted is not None and outcome.converted.index_row is not None:
                    path = self.work.relative_manifest(job)
                    self._remember([replace(outcome.converted.index_row, manifest=path)])
                self._announce(job.path, outcome.kind, outcome.reason, outcome.detail, job.source_size)
        return staged, again

    def _announce(self, path: str, kind: str, reason: str, detail: str, nbytes: int = 0) -> None:
        self.live.listener.settled(path, kind, nbytes=nbytes, reason=reason, detail=detail)
        if reason:
            self.logger.warning("%s %s: %s: %s", kind, path, reason, detail)

    def _label(self, jobs: Sequence[Job], retry: int) -> str:
        nbytes = format_nbytes(sum(job.source_size for job in jobs))
        again = f", retry {retry}" if retry else ""
        what = jobs[0].path if len(jobs) == 1 else f"{len(jobs)} checkpoints"
        return f"{what} ({nbytes}{again})"
