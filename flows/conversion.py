"""A run over a whole store: batches go out, final states come in, outcomes go into the account.

A batch that was written is proven next, before new batches begin; `flows.stages` has the rules for what is
lost or fails on the way. An interrupted run still accounts for what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prefect import get_run_logger

from flows.access import Running, current_flow_run_id, join_run, run_url, running
from flows.artifacts import Artifacts, conversion_rows
from flows.batches import MAX_BATCHES, cut, iter_batches
from flows.notices import failure_line, final_state
from flows.options import RunSettings
from flows.parsing import refuse_secrets
from flows.prefect.orchestrator import ABSENT_SECONDS, await_server
from flows.prefect.signals import INTERRUPTS
from flows.report_link import link_of
from flows.report_markdown import render_markdown
from flows.requests import with_named_files
from flows.stages import Stage, Stages, count_of
from ptbin.catalog import Job
from ptbin.catalog.checks import check_request
from ptbin.catalog.request import RunRequest
from ptbin.errors import StorageError
from ptbin.runs.account import FULL, Account
from ptbin.runs.outcomes import Outcome, Staged, one_line
from ptbin.runs.remembering import CheckpointMemory, Memory
from ptbin.runs.result import RunResult
from ptbin.runs.run_ids import new_run_id
from ptbin.runs.tally import Tally
from ptbin.runs.units import format_nbytes
from tasks.assets import announce
from tasks.converting import convert_and_verify_batch, convert_batch, find_up_to_date, verify_batch
from tasks.live import Interrupted
from tasks.steps import step, sure_step

LOGGED = 1000
"""Up to this many checkpoints get a line each in the flow run's log on the server."""
ASKING_COUNT = 200
ASKING_BATCHES = 50
"""With 200 batches, each written and proven, and the index, that is about 500 task runs at most."""
ASKING_WIDTH = 8
"""At least this many ask what is up to date: they wait for small answers and do no work."""


def carry_out(request: RunRequest, asked: Mapping[str, Any], make: Callable[[Running], Conversion]) -> Any:
    """A flow from its request to its final state; `make` gets what the run is made of."""
    refuse_secrets(request.source, request.dest, *([request.backup_dir] if request.backup_dir else []))
    settings = RunSettings.of(asked)
    with join_run(asked["run_id"] or new_run_id(), settings) as live:
        if live.plan is None:
            check_request(request, live.sides)
            request = with_named_files(request, asked, live.sides)
        else:  # the command line has made it
            request = live.plan.request
        with running(live, request, settings) as run:
            step(live, "list both sides", lambda: live.opened_plan.make(live.tick))
            live.opened_plan.refuse_nothing()
            return make(run).carry_out()


class Conversion:
    """One run: submits batches, turns final states into outcomes, keeps the account."""

    def __init__(self, run: Running, tally: Tally | None = None, memory: Memory | None = None) -> None:
        """Left out, tally and memory are those of the plan's checkpoints."""
        self.running = run
        self.live = run.live
        self.runner = run.runner
        self.plan = run.live.opened_plan
        self.work = self.plan.work
        self.lines: list[str] = []
        self.options = self.plan.request.making
        self.tally = tally or Tally.of(self.live.run_id, self.plan.request, run.settings.min_success)
        self.logger = get_run_logger()
        self.account = Account(
            self.plan,
            self.tally,
            memory or CheckpointMemory(self.plan),
            began=self.live.began,
            do=lambda name, write: sure_step(self.live, name, write),
            warn=self.logger.warning,
        )
        self.progress = Artifacts(f"ptbin-{self.plan.request.kind}", self.logger)
        self.stages = Stages(run, self.logger, self._keeps_on)

    def carry_out(self) -> Any:
        """The whole run from here on.

        An error is raised again once the run has accounted for itself; a deadline that passes only ends the
        run.
        """
        refused = self.account.open()
        if text := self.work.entries.links_words():
            self.live.listener.noted(text)
            self.logger.warning("%s", text)
        for entry in refused:
            self._report(entry)
        try:
            self._clean_up()
            self.drop_up_to_date()
            self.run()
        except Interrupted:
            self.running.stop()
        except INTERRUPTS:
            self.tally.interrupted = True
            self.running.stop()
            self.finish()
            raise
        except BaseException as error:
            self.tally.add_run_error(error)
            self.running.stop()
            self.finish()
            raise
        return self.finish()

    def _clean_up(self) -> None:
        """After a run that was killed: no other run will remove what it had under way."""
        if self.running.lease is None or not self.running.lease.follows_dead:
            return
        try:
            count = step(self.live, "discard unfinished outputs", self.work.discard_unfinished, retried=False)
        except StorageError as error:
            self.logger.warning("unfinished outputs of a run that was killed: %s", one_line(str(error)))
        else:
            if count:
                self.logger.info("removed %d unfinished outputs of a run that was killed", count)

    def drop_up_to_date(self) -> None:
        """Ask the manifests that the index of finished work does not know; those reads are fanned out."""
        asking = Stage(find_up_to_date, "up to date?", {}, self._answer, count_of("outputs"), here=True)
        parts = cut(
            self.work.iter_to_ask(), self.work.count_to_ask(), ASKING_COUNT, max_batches=ASKING_BATCHES
        )
        self._apart(asking, parts, width=max(self.runner.width, ASKING_WIDTH))

    def _apart(self, stage: Stage, parts: Iterable[Sequence[Any]], width: int | None = None) -> None:
        """Put batches through a stage that settles nothing of the run's own jobs."""
        Stages(self.running, self.logger, self._keeps_on).carry_out((stage, parts), width=width)

    def _answer(self, asked: Sequence[tuple[Job, Outcome]]) -> None:
        rows = [
            outcome.converted.index_row
            for _, outcome in asked
            if outcome.converted is not None and outcome.converted.index_row is not None
        ]
        planning = self.plan.request.planning
        self.account.remember(self.work.answer([job for job, _ in asked], rows, planning))

    def _keeps_on(self) -> bool:
        return not self.running.is_stopping and not (
            self.running.settings.fail_fast and self.tally.has_problems
        )

    def run(self) -> None:
        """Convert and prove what is to be done."""
        self.account.count_untouched()
        count, nbytes = self.work.to_do()
        self._begin(count, nbytes, f"checkpoints ({format_nbytes(nbytes)}) to convert")
        self.stages.carry_out(*self._parts())

    def _begin(self, count: int, nbytes: int, what: str) -> None:
        up_to_date = self.tally.count("up_to_date")
        self.live.listener.planned(count, nbytes, up_to_date)
        self.logger.info("%d %s, %d up to date", count, what, up_to_date)
        self.progress.begin(count)

    def _parts(self) -> Sequence[tuple[Stage, Iterable[Sequence[Any]]]]:
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

    def _count_rest(self) -> None:
        """Count what the run did not get to as well."""
        self.account.count_rest()

    def finish(self) -> Any:
        """Leave the index, the run record, the summary and the artifacts; the state says how it went."""
        tally, live = self.tally, self.live
        self._count_rest()
        summary = self.account.close(
            stopped=live.stop_reason,
            merges=not self.running.is_stopping,
            flow_run_id=current_flow_run_id(),
            prefect_url=run_url(),
        )
        message, folder, report = summary["message"], summary["record"], summary["report"]
        link = link_of(report, live.dest_options) if report else None
        self._announce_outputs(link)
        live.summary.update(summary, task_runs=live.task_runs)
        text = f"**{message}** in {summary['seconds']:.1f} s"
        self._show(text, folder, render_markdown(tally, summary, report, link))
        failures = [failure_line(entry) for entry in tally.problems]
        return final_state(RunResult.of(tally.kind, summary), message, failures, link or report)

    def _announce_outputs(self, link: str | None) -> None:
        """Prefect's assets of what was made; a run that made nothing has none."""
        try:
            self.live.task_runs += announce(self.tally, report=link)
        except Exception as error:  # noqa: BLE001 - whatever Prefect's client raises
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

    def _settle_all(self, final: Sequence[tuple[Any, Outcome]]) -> None:
        for job, outcome in final:
            self._settle(job, outcome)
        self._log_lines()
        self.progress.update(len(self.account.settled), self.tally.message())

    def _settle(self, job: Any, outcome: Outcome) -> None:
        """One checkpoint has its final outcome."""
        entry = self.account.settle(job, outcome)
        if self.account.is_full:
            self.running.stop(FULL)
        self._report(entry)

    def _report(self, entry: Outcome) -> None:
        """To the listener and to the log; what went well is logged with its batch (`_log_lines`)."""
        if self.runner.is_remote:
            self.live.listener.moved(entry.read_nbytes)
        self.live.listener.settled(entry)
        if entry.reason:
            self.logger.warning("%s %s: %s: %s", entry.kind, entry.path, entry.reason, entry.detail)
        elif len(self.account.settled) <= LOGGED:
            self.lines.append(entry.line())

    def _log_lines(self) -> None:
        """A line per checkpoint, a record per batch: each record costs the server and this process time."""
        if self.lines:
            self.logger.info("%s", "\n".join(self.lines))
            self.lines = []

    def _label(self, jobs: Sequence[Any]) -> str:
        nbytes = sum(job.item.source_size if isinstance(job, Staged) else job.source_size for job in jobs)
        what = jobs[0].path if len(jobs) == 1 else f"{len(jobs)} checkpoints"
        return f"{what} ({format_nbytes(nbytes)})"
