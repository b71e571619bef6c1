"""A run over a whole store under way: batches out, final states in, outcomes into the tally.

A batch that was written is proven next, before new batches begin; `flows.stages` has the rules for what is
lost or fails on the way. An interrupted run still accounts for what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefect import Task, get_run_logger

from flows.access import Running, RunSettings, current_flow_run_id, join_run, run_url, running
from flows.artifacts import Artifacts, conversion_rows
from flows.batches import MAX_BATCHES, cut, iter_batches
from flows.fanout import quote
from flows.notices import failure_line, final_state, log_failures, state_message
from flows.prefect.orchestrator import ABSENT_SECONDS, await_server
from flows.prefect.signals import INTERRUPTS
from flows.report_link import link_of
from flows.report_markdown import render_markdown
from flows.selection import with_named_files
from flows.stages import Stage, Stages, count_of
from flows.wishes import refuse_secrets
from ptbin.catalog import Job, Problem
from ptbin.catalog.checks import check_request
from ptbin.catalog.finished import FinishedRow
from ptbin.catalog.request import RunRequest
from ptbin.errors import PtbinError, StorageError
from ptbin.history.failures import Unconverted
from ptbin.runs.ending import end_run
from ptbin.runs.outcomes import Outcome, Staged, one_line
from ptbin.runs.record import new_run_id
from ptbin.runs.remembering import close_ledger, open_ledger
from ptbin.runs.result import RunResult
from ptbin.runs.tally import Tally
from ptbin.runs.units import format_nbytes
from tasks.assets import announce
from tasks.batches import FULL_AFTER
from tasks.converting import convert_and_verify_batch, convert_batch, verify_batch
from tasks.listing import discard_unfinished, find_up_to_date, make_plan, plan_of
from tasks.live import Interrupted, Settled
from tasks.recording import merge_index, write_index, write_ledger, write_run_record

__all__ = ["Conversion", "carry_out"]

LOGGED = 1000
"""So many checkpoints have a line of their own in the flow run's log on the server."""
SEGMENT_ROWS = 5_000
ASKING_COUNT = 200
ASKING_BATCHES = 50
"""With 200 batches, each written and proven, and the index, that is about 500 task runs at most."""
ASKING_WIDTH = 8
"""At least so many ask what is up to date: that is waiting for small answers, not work."""


def carry_out(
    request: RunRequest, asked: Mapping[str, Any], make: Callable[[Running, Tally, bool], Conversion]
) -> Any:
    """A flow from its request to its final state; `make` gets what the run is made of."""
    refuse_secrets(request.source, request.dest, *([request.backup_dir] if request.backup_dir else []))
    settings = RunSettings.of(asked)
    with join_run(asked["run_id"] or new_run_id(), settings) as live:
        check_request(request, **live.sides)
        request = with_named_files(request, asked, **live.sides)
        with running(live, request, settings) as run:
            make_plan(live.run_id)
            plan_of(live).refuse_nothing()
            tally = Tally(
                live.run_id,
                request.source,
                request.dest,
                kind=request.kind,
                min_success=asked.get("min_success"),
            )
            return make(run, tally, asked["fail_fast"]).carry_out()


def _record(task: Task[..., None], run_id: str, place: str, *values: Any) -> None:
    """Have a task write the run's own files; write them here, where Prefect cannot have it run."""
    try:
        task(run_id, place, *map(quote, values))
    except PtbinError:
        raise
    except Exception:  # noqa: BLE001 - whatever Prefect's client comes to
        task.fn(run_id, place, *values)


class Conversion:
    """One run: submits batches, turns final states into outcomes, keeps the tally."""

    artifact_key = "ptbin-convert"
    keeps_ledger = True
    """Whether what failed is remembered from run to run."""

    def __init__(self, run: Running, tally: Tally, fail_fast: bool) -> None:
        self.running = run
        self.live = run.live
        self.runner = run.runner
        self.plan = plan_of(run.live)
        self.work = self.plan.work
        self.full = 0
        self.lines: list[str] = []
        self.index_rows: list[FinishedRow] = []
        self.segments = 0
        self.options = self.plan.request.making
        self.tally = tally
        self.fail_fast = fail_fast
        self.logger = get_run_logger()
        self.progress = Artifacts(self.artifact_key, self.logger)
        self.counted_current = False
        self.stages = Stages(run, self.logger, self._keeps_on)
        self.stages.task_runs = 1  # the listing

    def refuse(self, collisions: Sequence[Problem]) -> None:
        """Several sources of one output: none of them is converted."""
        for problem, entry in zip(collisions, self.tally.add_collisions(collisions), strict=True):
            self._announce(problem.source, entry.outcome, problem.reason, problem.detail)

    def carry_out(self) -> Any:
        """The whole run from here on.

        Whatever is raised on the way is raised again once the run has accounted for itself; a deadline that
        passes is no more than a reason to end.
        """
        self._open_ledger()
        self._note_passed_over()
        self.refuse(self.plan.problems)
        try:
            self._clean_up()
            self.drop_up_to_date()
            self.run()
        except Interrupted:
            self.running.stop()
            self._account_for_the_rest()
        except INTERRUPTS:
            self.tally.interrupted = True
            self._end_early()
            raise
        except BaseException as error:
            reason = error.reason if isinstance(error, PtbinError) else "internal_error"
            detail = one_line(f"{type(error).__name__}: {error}")
            self.tally.run_problems.append(Problem(self.tally.dest, reason, detail))
            self._end_early()
            raise
        return self.finish()

    def _note_passed_over(self) -> None:
        """What of SOURCE the listing did not look at, by its rule; links that lead out of it are named."""
        entries = self.work.entries
        self.tally.skipped.update(entries.counts)
        if text := entries.links_words():
            self.live.listener.noted(text)
            self.logger.warning("%s", text)

    def _open_ledger(self) -> None:
        """What earlier runs failed at. Where that cannot be read, nothing is known, and the run fails."""
        if not self.keeps_ledger:
            return
        try:
            self._read_ledger()
        except PtbinError as error:
            self.keeps_ledger = False
            self.tally.run_problems.append(Problem(self.tally.dest, error.reason, one_line(str(error))))

    def _read_ledger(self) -> None:
        open_ledger(self.tally, self.plan)

    def _ledger_rows(self) -> Sequence[Unconverted] | None:
        return close_ledger(self.tally, self.plan, self.stages.settled)

    def _recorded_selection(self) -> Mapping[str, Any] | None:
        """What of SOURCE the run looked at, for `ptbin status`."""
        return self.plan.request.selection() if self.keeps_ledger else None

    def _close_ledger(self) -> None:
        if not self.keeps_ledger:
            return
        rows = self._ledger_rows()
        if rows is None:
            return
        self.stages.task_runs += 1
        try:
            _record(write_ledger, self.live.run_id, self.tally.place, rows)
        except StorageError as error:
            self.logger.warning("what was not converted: %s", one_line(str(error)))

    def _end_early(self) -> None:
        self.running.stop()
        self._account_for_the_rest()
        self.finish()

    def _clean_up(self) -> None:
        """After a run that was killed: nobody else will remove what it had under way."""
        if self.running.lease is None or not self.running.lease.follows_dead:
            return
        self.stages.task_runs += 1
        try:
            if count := discard_unfinished(self.live.run_id):
                self.logger.info("removed %d unfinished outputs of a run that was killed", count)
        except StorageError as error:
            self.logger.warning("unfinished outputs of a run that was killed: %s", one_line(str(error)))

    def drop_up_to_date(self) -> None:
        """Ask the manifests that the index of finished work does not know; those reads are fanned out."""
        asking = Stage(find_up_to_date, "up to date?", {}, self._answer, count_of("outputs"), here=True)
        parts = cut(
            self.work.iter_to_ask(), self.work.count_to_ask(), ASKING_COUNT, max_batches=ASKING_BATCHES
        )
        stages = Stages(self.running, self.logger, self._keeps_on)
        stages.carry_out((asking, parts), width=max(self.runner.width, ASKING_WIDTH))
        self.stages.task_runs += stages.task_runs

    def _answer(self, asked: Sequence[tuple[Job, Outcome]]) -> None:
        rows = [row for _, outcome in asked if (row := _row_of(outcome)) is not None]
        planning = self.plan.request.planning
        self._remember(self.work.answer([job for job, _ in asked], rows, planning))

    def _keeps_on(self) -> bool:
        return not self.running.is_stopping and not (self.fail_fast and self.tally.has_problems)

    def run(self) -> None:
        """Convert and prove what is to be done; every checkpoint is in the tally afterwards."""
        self._count_current()
        up_to_date = self.tally.count("up_to_date")
        count, nbytes = self.work.to_do()
        self.live.listener.planned(count, nbytes, up_to_date)
        self.logger.info(
            "%d checkpoints (%s) to convert, %d up to date", count, format_nbytes(nbytes), up_to_date
        )
        self.progress.begin(count)
        self.stages.carry_out(*self._parts())
        self._account_for_the_rest()

    def _parts(self) -> Sequence[tuple[Stage, Iterable[Sequence[Job]]]]:
        """What the run is made of: stages, and the batches that go through them."""
        return [(self._making(), self._batches(MAX_BATCHES))]

    def _making(self) -> Stage:
        """How an output is made: written, then proven; both at once where a task run is dear."""
        values = {"options": self.options}
        if self.runner.is_remote:
            return Stage(
                convert_and_verify_batch, "convert and verify", values, self._settle_all, self._label
            )
        write = Stage(convert_batch, "convert", values, self._settle_all, self._label)
        prove = Stage(verify_batch, "verify", {}, self._settle_all, self._label)
        return write >> prove

    def _batches(self, max_batches: int, *, copies: bool | None = None) -> Iterable[Sequence[Job]]:
        count, nbytes = self.work.to_do(copies=copies)
        return iter_batches(
            self.work.iter_to_do(copies=copies),
            count,
            nbytes,
            nbytes=lambda job: job.source_size,
            workers=self.runner.width,
            max_batches=max_batches,
            most=self.runner.batch_count,
            per_worker=self.runner.batches_per_worker,
        )

    def _account_for_the_rest(self) -> None:
        """What the run did not come to is told as well."""
        self._count_current()
        self.tally.add_rest(self.work, self.stages.settled)

    def _count_current(self) -> None:
        if not self.counted_current:
            self.counted_current = True
            self.tally.add_untouched(self.work)

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
        self.stages.task_runs += 1
        name = f"{self.tally.run_id}-{self.segments:04d}"
        try:
            _record(write_index, self.live.run_id, self.tally.dest, name, rows)
        except StorageError as error:
            self.logger.warning("index of finished work: %s", one_line(str(error)))

    def _merge_index(self) -> None:
        if not self.plan.has_many_segments:
            return
        self.stages.task_runs += 1
        try:
            _record(merge_index, self.live.run_id, f"{self.tally.run_id}-merged")
        except StorageError as error:
            self.logger.warning("index of finished work: %s", one_line(str(error)))

    def finish(self) -> Any:
        """Leave the index, the run record, the summary and the artifacts; the state says how it went."""
        self._write_index()
        if not self.running.is_stopping:
            self._merge_index()
        tally = self.tally
        if reason := self.live.stop_reason:
            tally.run_problems.append(Problem(tally.dest, "run_stopped", reason))
        self._close_ledger()
        live = self.live
        summary = end_run(
            tally,
            self.options,
            began=live.began,
            selection=self._recorded_selection(),
            source_options=live.source_options,
            dest_options=live.dest_options,
            write=lambda folder, *files: _record(write_run_record, live.run_id, folder, *files),
            flow_run_id=current_flow_run_id(),
            prefect_url=run_url(),
        )
        message, folder, report = summary["message"], summary["record"], summary["report"]
        link = link_of(report, live.dest_options) if report else None
        self._announce_outputs(link)
        live.summary.update(summary, task_runs=self.stages.task_runs + 1)  # the run record
        text = f"**{message}** in {summary['seconds']:.1f} s"
        self._show(text, folder, render_markdown(tally, summary, report, link))
        failures = [failure_line(entry) for entry in tally.problems]
        log_failures(self.logger, failures)
        text = state_message(message, failures, link or report)
        return final_state(RunResult.of(tally.kind, summary), text)

    def _announce_outputs(self, link: str | None) -> None:
        """Prefect's assets of what was made; a run that made nothing has none."""
        tally = self.tally
        if not (made := tally.made()):
            return
        counts = {name: tally.count(name) for name in ("converted", "up_to_date", "rejected", "failed")}
        facts = {"run": tally.run_id, "kind": tally.kind, **counts}
        try:
            self.stages.task_runs += announce(tally.source, tally.place, facts, made, report=link)
        except Exception as error:  # noqa: BLE001 - whatever Prefect's client comes to
            self.logger.warning("asset events are missing: %s", type(error).__name__)

    def _show(self, message: str, folder: str, essence: str) -> None:
        """The artifacts. All that matters is done by now: an interrupt only shortens this."""
        tally = self.tally
        try:
            there = await_server(self.live.check, seconds=0.0 if tally.interrupted else ABSENT_SECONDS)
        except INTERRUPTS:
            there = False
        if not there:
            self.logger.warning("Prefect's server is gone: the run ends without it")
            return
        if folder:
            self.progress.report(essence)
        self.progress.table(
            conversion_rows(tally.entries),
            f"{message}\n\nfrom `{tally.source}` to `{tally.dest}`, run record `{folder}`",
        )
        self.progress.end()

    def _settle_all(self, final: Sequence[tuple[Job, Outcome]]) -> None:
        for job, outcome in final:
            self._settle(job, outcome)
        self._log_lines()
        self.progress.update(len(self.stages.settled), self.tally.message())

    def _settle(self, job: Job, outcome: Outcome) -> None:
        """One checkpoint has its final outcome."""
        self.full += outcome.is_full
        if self.full >= FULL_AFTER:
            self.running.stop("there is no room left in DEST; free some, then run again")
        kind = self.tally.add(job, outcome).outcome
        facts = outcome.converted
        if facts is not None and facts.index_row is not None:
            self._remember([replace(facts.index_row, manifest=self.work.relative_manifest(job))])
        if self.runner.is_remote and facts is not None:
            self.live.listener.moved(facts.read_nbytes)
        self.live.listener.settled(
            Settled(
                job.path,
                kind,
                job.source_size,
                outcome.reason,
                outcome.detail,
                outcome.seconds,
                facts.read_nbytes if facts is not None else 0,
                facts.written_nbytes if facts is not None else 0,
            )
        )
        if outcome.reason:
            self.logger.warning("%s %s: %s: %s", kind, job.path, outcome.reason, outcome.detail)
        elif len(self.stages.settled) <= LOGGED:
            written = f", {format_nbytes(facts.written_nbytes)} written" if facts is not None else ""
            size = format_nbytes(job.source_size)
            what = outcome.kind.replace("_", " ")
            changed = f"; {outcome.detail}" if outcome.kind == "copied" and outcome.detail else ""
            self.lines.append(f"{what} {job.path} ({size}{written}) in {outcome.seconds:.2f} s{changed}")

    def _log_lines(self) -> None:
        """A line per checkpoint, a record per batch: each record costs the server and this process time."""
        if self.lines:
            self.logger.info("%s", "\n".join(self.lines))
            self.lines = []

    def _announce(self, path: str, kind: str, reason: str, detail: str) -> None:
        self.live.listener.settled(Settled(path, kind, reason=reason, detail=detail))
        self.logger.warning("%s %s: %s: %s", kind, path, reason, detail)

    def _label(self, jobs: Sequence[Job | Staged]) -> str:
        nbytes = sum(job.item.source_size if isinstance(job, Staged) else job.source_size for job in jobs)
        what = jobs[0].path if len(jobs) == 1 else f"{len(jobs)} checkpoints"
        return f"{what} ({format_nbytes(nbytes)})"


def _row_of(outcome: Outcome) -> FinishedRow | None:
    return outcome.converted.index_row if outcome.converted is not None else None
