"""The migrate flow: one model registry into another, every checkpoint on the way as weights.

Versions are moved side by side and made known in order, model by model: a destination that numbers versions
itself (MLflow) gives them numbers in the order of the source. What the destination cannot keep is told before
anything is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.access import DEFAULT_REQUESTS, Running, RunSettings, join_run, running
from flows.batches import cut, iter_batches
from flows.conversion import Conversion, halves
from flows.fanout import Work, unexamined
from flows.parameters import described
from flows.run_record import new_run_id
from flows.runners import RunnerName
from flows.tally import Entry, Tally
from flows.wishes import MAX_WORKERS, build_options, parse_duration, refuse_secrets
from ptbin.catalog import Job, Problem
from ptbin.errors import UsageError
from ptbin.options import ConvertOptions, FileDigest, OnUnsafe, OutputFormat, VerifyLevel
from ptbin.registries import Migration, wanted_names
from ptbin.registries.planning import Versions
from ptbin.registries.transfer import is_of_training
from ptbin.registries.values import natural_order
from tasks.live import Settled
from tasks.migrating import (
    Registries,
    VersionJob,
    plan_versions,
    register_batch,
    transfer_batch,
    update_models,
)
from tasks.outcomes import Outcome, Written
from tasks.retrying import retry_delay

__all__ = ["Migrating", "MigrationTally", "loss_lines", "migrate"]

TRANSFERS = 150
VERSIONS_PER_BATCH = 8
MODELS_PER_UPDATE = 50
UPDATES = 50
"""With 150 transfers, each followed by one registration at most, that is about 400 task runs."""


@dataclass(slots=True)
class MigrationTally(Tally):
    """Counts are of versions; the entries of what was converted are checkpoints."""

    kind: str = "migrate"
    versions: list[dict[str, Any]] = field(default_factory=list)
    """A row for each version of the plan, in its order, with what became of it."""
    updated: int = 0
    """Models whose metadata was brought in step."""
    files: Counter[str] = field(default_factory=Counter)

    def message(self) -> str:
        parts = [
            f"migrated {self.count('converted')}",
            f"up to date {self.count('up_to_date')}",
            f"rejected {self.count('rejected')}",
            f"failed {self.count('failed')}",
        ]
        if self.updated:
            parts.append(f"models updated {self.updated}")
        if skipped := self.count("not_a_checkpoint"):
            parts.append(f"without a checkpoint {skipped}")
        if left := self.count("not_tried"):
            parts.append(f"not tried {left}")
        parts.extend(f"{problem.reason}: {problem.detail}" for problem in self.run_problems)
        return ("interrupted: " if self.interrupted else "") + ", ".join(parts)

    def summary(self, seconds: float) -> dict[str, Any]:
        document = Tally.summary(self, seconds)
        return {
            **document,
            "migrated": document["converted"],
            "converted": sum(1 for entry in self.entries if entry.converted is not None),
            "copied": self.files["copied"],
            "skipped": self.count("not_a_checkpoint"),
            "left_alone": self.files["left_alone"],
            "updated": self.updated,
            "versions": list(self.versions),
        }


class Migrating(Conversion):
    """A run whose jobs are versions: moved by any worker, registered in order."""

    artifact_key = "ptbin-migrate"
    keeps_ledger = False

    def __init__(
        self,
        run: Running,
        options: ConvertOptions,
        tally: MigrationTally,
        fail_fast: bool,
        registries: Registries,
        plan: Migration,
    ) -> None:
        super().__init__(run, options, tally, fail_fast)
        self.registries = registries
        self.plan = plan
        self.versions = tally
        self.jobs = [
            VersionJob.of(model, step)
            for model in plan.models
            for step in model.steps
            if step.action == "migrate"
        ]
        self.rows = {step.version.path: step.to_json() for step in plan.steps()}
        self.waiting: dict[str, list[VersionJob]] = {}
        """By model, the versions that are not settled yet, in order."""
        for job in self.jobs:
            self.waiting.setdefault(job.parts[1].name, []).append(job)
        for waiting in self.waiting.values():
            # Where the destination counts, what was passed over earlier comes behind what keeps its number.
            waiting.sort(key=lambda job: natural_order(job.parts[0].dest_version))
        self.written: dict[str, Written] = {}
        self.seconds: dict[str, float] = {}
        self.registering: set[str] = set()

    def drop_up_to_date(self) -> None:
        """The plan knows."""

    def _clean_up(self) -> None:
        """Unfinished outputs lie in places of their own; whoever takes up the version goes on from there.

        What nobody takes up any more, since its source has changed again, is removed.
        """
        _, there = self.registries.open(self.live)
        there.tidy({job.parts[0].fingerprint for job in self.jobs})

    def run(self) -> None:
        for line in loss_lines(self.plan):
            self.logger.info("not kept: %s", line)
            self.live.listener.noted(f"not kept: {line}")
        for step in self.plan.steps():
            if step.action == "up_to_date":
                self._close(step.version.path, step.version.uri, Outcome(step.version.path, "up_to_date"))
            elif step.action == "refused":
                refused = Outcome(step.version.path, "rejected", step.reason, step.detail)
                self._close(step.version.path, step.version.uri, refused)
                self._announce(step.version.path, "rejected", step.reason, step.detail)
        count = len(self.jobs)
        up_to_date = self.tally.count("up_to_date")
        self.live.listener.planned(count, 0, up_to_date)
        self.logger.info("%d versions to migrate, %d up to date", count, up_to_date)
        self.progress.begin(count)
        for plan in self.plan.models:
            if plan.problem and not plan.steps:
                self.tally.run_problems.append(Problem(plan.model.name, "registry_error", plan.problem))
        self._fan_out(self._batches())
        self._update()
        self._account_for_the_rest()

    def _batches(self) -> Iterable[Work]:
        for batch in iter_batches(
            self.jobs,
            len(self.jobs),
            0,
            nbytes=lambda job: 0,
            workers=self.runner.width,
            max_batches=TRANSFERS,
            most=VERSIONS_PER_BATCH,
            per_worker=self.runner.batches_per_worker,
        ):
            yield self._transfer(batch)

    def _transfer(self, jobs: Sequence[VersionJob], retry: int = 0, lost: int = 0) -> Work:
        label = self._label(jobs, retry)

        def submit() -> PrefectFuture[Any]:
            return self._submit(
                transfer_batch, label=label, jobs=jobs, registries=self.registries, options=self.options
            )

        def then(state: State[Any]) -> Iterable[Work]:
            if self._was_lost(jobs, state, lost):
                yield from (self._transfer(part, retry, lost + 1) for part in halves(jobs))
                return
            staged, again = self._collect(jobs, state, retry)
            for outcome in staged:
                assert outcome.written is not None
                self.written[outcome.path] = outcome.written
                self.seconds[outcome.path] = outcome.seconds
            if again:
                yield self._transfer(cast("list[VersionJob]", again), retry + 1)
            yield from self._register_ready()

        return Work(submit, then, delay=retry_delay(retry) if retry else 0.0)

    def _register_ready(self) -> Iterable[Work]:
        """Of each model that nobody registers just now, the versions before which none is missing."""
        ready: list[VersionJob] = []
        for model, jobs in self.waiting.items():
            if model in self.registering:
                continue
            while jobs and (jobs[0].path in self.written or jobs[0].path in self.settled_paths):
                job = jobs.pop(0)
                if job.path in self.written:
                    ready.append(job)
                    self.registering.add(model)
        if ready:
            yield self._register(ready)

    def _register(self, jobs: Sequence[VersionJob], retry: int = 0, lost: int = 0) -> Work:
        label = self._label(jobs, retry)

        def submit() -> PrefectFuture[Any]:
            return self._submit(
                register_batch,
                label=label,
                jobs=jobs,
                written=[self.written[job.path] for job in jobs],
                registries=self.registries,
            )

        def then(state: State[Any]) -> Iterable[Work]:
            if self._was_lost(jobs, state, lost):
                yield self._register(jobs, retry, lost + 1)
                return
            _, again = self._collect(jobs, state, retry, self.seconds)
            self.registering -= {job.parts[1].name for job in jobs}
            if again:
                self.registering |= {job.parts[1].name for job in cast("list[VersionJob]", again)}
                yield self._register(cast("list[VersionJob]", again), retry + 1)
            yield from self._register_ready()

        return Work(submit, then, urgent=True, delay=retry_delay(retry) if retry else 0.0)

    def _update(self) -> None:
        """Metadata that differs of what is registered already: an alias that has moved, say."""
        plans = [plan for plan in self.plan.models if plan.needs_update]
        if not plans or not self._keeps_on():
            return

        def work(part: list[Any]) -> Work:
            def then(state: State[Any]) -> Iterable[Work]:
                if not state.is_completed():
                    detail = f"the task run ended {state.name}: {state.message}"
                    problems = [{"source": self.tally.dest, "reason": "internal_error", "detail": detail}]
                else:
                    problems = state.result()
                self.versions.updated += len(part) - len(problems)
                self.tally.run_problems += [Problem.from_json(problem) for problem in problems]
                return ()

            label = part[0].model.name if len(part) == 1 else f"{len(part)} models"
            return Work(
                lambda: self._submit(update_models, label=label, plans=part, registries=self.registries), then
            )

        self._fan_out(work(part) for part in cut(plans, len(plans), MODELS_PER_UPDATE, max_batches=UPDATES))

    # -- accounting -----------------------------------------------------------------------------------

    def _settle(self, job: Job, outcome: Outcome) -> None:
        self.settled_paths.add(job.path)
        self._close(job.path, job.source_uri, outcome)
        facts = outcome.written
        read = written = nbytes = 0
        if facts is not None and outcome.kind == "converted":
            fresh = [part for part in facts.parts if part[0] in facts.fresh]
            nbytes = sum(size for _, _, size in facts.parts)
            read = sum(converted.read_nbytes for _, converted, _ in fresh)
            written = sum(converted.written_nbytes for _, converted, _ in fresh)
            self.tally.files["copied"] += facts.copied
        if self.runner.is_remote:
            self.live.listener.moved(read)
        kind = "migrated" if outcome.kind == "converted" else outcome.kind
        self.live.listener.settled(
            Settled(job.path, kind, nbytes, outcome.reason, outcome.detail, outcome.seconds, read, written)
        )
        if outcome.reason:
            self.logger.warning("%s %s: %s: %s", kind, job.path, outcome.reason, outcome.detail)
        else:
            now = f" as version {facts.dest_version}" if facts is not None else ""
            self.lines.append(f"{kind.replace('_', ' ')} {job.path}{now} in {outcome.seconds:.2f} s")

    def _close(self, path: str, uri: str, outcome: Outcome) -> None:
        """One version has its final outcome: a row of its own, and an entry for each checkpoint in it."""
        row = self.rows.pop(path)
        del row["action"]
        row["outcome"] = "migrated" if outcome.kind == "converted" else outcome.kind
        if outcome.written is not None and outcome.written.dest_version:
            row["dest_version"] = outcome.written.dest_version
        elif outcome.kind != "up_to_date":
            row["dest_version"] = None
        if outcome.written is not None and outcome.written.left:
            row["left_behind"] = list(outcome.written.left)
            self.tally.files["left_alone"] += sum(map(is_of_training, outcome.written.left))
        if outcome.reason or outcome.detail:
            row |= {"reason": outcome.reason or "no_checkpoint", "detail": outcome.detail}
        self.versions.versions.append(row)
        self.tally.counts[outcome.kind] += 1
        if outcome.kind != "converted" or outcome.written is None:
            entry = Entry(path, uri, 0, outcome.kind, outcome.reason, outcome.detail, seconds=outcome.seconds)
            self.tally.entries.append(entry)
            return
        for inside, converted, size in outcome.written.parts:
            self.tally.entries.append(
                Entry(
                    f"{path}/{inside}", uri, size, "converted", converted=converted, seconds=outcome.seconds
                )
            )

    def _account_for_the_rest(self) -> None:
        for job in self.jobs:
            if job.path in self.rows:
                self._close(job.path, job.source_uri, Outcome(job.path, "not_tried"))
        order = {step.version.path: index for index, step in enumerate(self.plan.steps())}
        self.versions.versions.sort(key=lambda row: order[f"{row['model']}/{row['version']}"])

    def _label(self, jobs: Sequence[Job], retry: int) -> str:
        what = jobs[0].path if len(jobs) == 1 else f"{len(jobs)} versions"
        return f"{what}, retry {retry}" if retry else what


def loss_lines(plan: Migration) -> list[str]:
    """What of the source the destination cannot keep, a line each; those of all versions first."""
    lines = list(plan.never_kept) if any(step.action == "migrate" for step in plan.steps()) else []
    for model in plan.models:
        lines += [f"{model.model.name}: {text}" for text in model.not_kept]
        for step in model.steps:
            lines += [f"{step.version.model}: {text}" for text in step.not_kept]
    return lines


@flow(
    name="migrate",
    flow_run_name="{source} to {dest}",
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_WORKERS),  # type: ignore[arg-type]
    persist_result=False,
)
@described
def migrate(
    source: str,
    dest: str,
    *,
    layout: str | None = None,
    source_layout: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    versions: Versions = "all",
    format: OutputFormat = "torch",  # noqa: A002 - the name on the command line and in manifests
    select: str | Sequence[str] | None = None,
    flatten: bool = False,
    split: bool = False,
    strip_prefix: str | None = None,
    rename: Sequence[str] = (),
    drop: Sequence[str] = (),
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    tie_by_value: bool = False,
    recipe: str | None = None,
    parts: bool = False,
    on_unsafe: OnUnsafe = "reject",
    verify: VerifyLevel = "checksum",
    file_digest: FileDigest = "sha256",
    provenance: bool = False,
    fail_fast: bool = False,
    runner: RunnerName = "threads",
    runner_address: str | None = None,
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] | None = None,
    max_requests: Annotated[int, Field(ge=1)] = DEFAULT_REQUESTS,
    deadline: str | float | None = None,
    source_options: str | None = None,
    dest_options: str | None = None,
    run_id: str | None = None,
) -> State[Any]:
    """Bring the models of the registry `source` into the registry `dest`, as weights.

    Ends Completed, or Failed where a version was rejected or failed.
    """
    options = build_options(
        format=format,
        rename=rename,
        drop=drop,
        select=select,
        flatten=flatten,
        split=split,
        strip_prefix=strip_prefix,
        dtype=dtype,
        max_shard_size=max_shard_size,
        tie_by_value=tie_by_value,
        recipe=recipe,
        parts=parts,
        on_unsafe=on_unsafe,
        verify=verify,
        file_digest=file_digest,
        provenance=provenance,
    )
    refuse_secrets(source, dest)
    settings = RunSettings(
        runner,
        runner_address,
        workers,
        max_requests,
        parse_duration(deadline) if deadline is not None else None,
        source_options,
        dest_options,
    )
    registries = Registries(source, dest, source_layout, layout)
    with join_run(run_id or new_run_id(), source_options, dest_options) as live:
        here, there = registries.open(live)
        here.check_readable()
        there.check_writable()
        # Before anything is made at DEST.
        if not here.has_models(lambda name: wanted_names(include, exclude, name)):
            raise UsageError(f"no models to migrate in SOURCE: {here.uri}")
        home = there.home()
        with running(live, home, settings) as run:
            plan = plan_versions(
                live.run_id,
                unexamined(registries),
                list(include),
                list(exclude),
                versions,
                unexamined(options),
            )
            tally = MigrationTally(live.run_id, source, dest, home=home)
            return Migrating(run, options, tally, fail_fast, registries, plan).carry_out([])
