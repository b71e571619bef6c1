"""The migrate flow: one model registry into another, every checkpoint on the way as weights.

Versions are moved side by side and registered in order, model by model: a destination that numbers versions
itself (MLflow) gives them numbers in the order of the source. What the destination cannot keep is reported
before anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from flows.access import Running, join_run, running
from flows.batches import cut, iter_batches
from flows.conversion import Conversion
from flows.forms import PLACES
from flows.options import CONTENT, MIGRATE, RunSettings, chosen
from flows.parsing import build_options, refuse_secrets
from flows.requests import Text
from flows.run_flow import run_flow
from flows.stages import Stage
from ptbin.catalog import Problem
from ptbin.catalog.request import RunRequest
from ptbin.errors import UsageError
from ptbin.registries import Migration, ModelPlan, wanted_names
from ptbin.registries.migration import Registries, prepare
from ptbin.registries.values import natural_order
from ptbin.runs.migrating import MigrationTally, loss_lines
from ptbin.runs.outcomes import Outcome, Staged
from ptbin.runs.remembering import VersionMemory
from ptbin.runs.run_ids import new_run_id
from tasks.migrating import (
    VersionJob,
    model_of,
    register_batch,
    transfer_batch,
    update_models,
)
from tasks.steps import step

TRANSFERS = 150
VERSIONS_PER_BATCH = 8
MODELS_PER_UPDATE = 50
UPDATES = 50
"""With 150 transfers, each followed by one registration at most, that is about 400 task runs."""


class Migrating(Conversion):
    """A run whose jobs are versions: moved by any worker, registered in order."""

    def __init__(
        self,
        run: Running,
        tally: MigrationTally,
        memory: VersionMemory,
        registries: Registries,
        plan: Migration,
    ) -> None:
        super().__init__(run, tally, memory)
        self.registries = registries
        self.migration = plan
        self.versions = tally
        self.jobs = [
            VersionJob(step, replace(model, model=replace(model.model, versions=()), steps=()))
            for model in plan.models
            for step in model.steps
            if step.action == "migrate"
        ]
        # Where the destination counts, what was passed over earlier comes behind what keeps its number.
        in_order = sorted(self.jobs, key=lambda job: natural_order(job.step.dest_version))
        self.stages.expect(model_of, in_order)

    def drop_up_to_date(self) -> None:
        """The plan knows what is up to date."""

    def _clean_up(self) -> None:
        """Unfinished outputs lie apart; a run that takes up the version goes on from there.

        What no run takes up any more, since its source has changed again, is removed.
        """
        _, there = self.registries.open(self.live.sides)
        there.tidy({job.step.fingerprint for job in self.jobs})

    def run(self) -> None:
        for line in loss_lines(self.migration):
            self.logger.info("not kept: %s", line)
            self.live.listener.noted(f"not kept: {line}")
        for one in self.migration.steps():
            if one.action == "up_to_date":
                self.versions.close(one, Outcome(one.version.path, "up_to_date"))
            elif one.action == "refused":
                refused = Outcome(one.version.path, "rejected", one.reason, one.detail)
                self._report(self.versions.close(one, refused))
        self._begin(len(self.jobs), 0, "versions to migrate")
        for plan in self.migration.models:
            if plan.problem and not plan.steps:
                self.tally.run_problems.append(Problem(plan.model.name, "registry_error", plan.problem))
        self.stages.carry_out(*self._parts())
        self._update()

    def _parts(self) -> Sequence[tuple[Stage, Iterable[Sequence[VersionJob]]]]:
        sides = {"registries": self.registries}
        transfer = Stage(
            transfer_batch, "transfer", {**sides, "options": self.options}, self._settle_all, self._label
        )
        register = Stage(
            register_batch, "register", sides, self._settle_all, self._label, splits=False, key=model_of
        )
        batches = iter_batches(
            self.jobs,
            len(self.jobs),
            0,
            nbytes=lambda job: 0,
            workers=self.runner.width,
            max_batches=TRANSFERS,
            most=VERSIONS_PER_BATCH,
            per_worker=self.runner.batches_per_worker,
        )
        return [(transfer >> register, batches)]

    def _update(self) -> None:
        """Update metadata of what is registered already: an alias that has moved, say."""
        plans = [plan for plan in self.migration.models if plan.needs_update]
        if not plans or not self._keeps_on():
            return

        def settle(final: Sequence[tuple[ModelPlan, Outcome]]) -> None:
            for plan, outcome in final:
                if outcome.kind == "updated":
                    self.versions.updated += 1
                elif outcome.reason:
                    self.tally.run_problems.append(Problem(plan.path, outcome.reason, outcome.detail))

        def label(part: Sequence[ModelPlan]) -> str:
            return part[0].path if len(part) == 1 else f"{len(part)} models"

        stage = Stage(update_models, "update", {"registries": self.registries}, settle, label)
        self._apart(stage, cut(plans, len(plans), MODELS_PER_UPDATE, max_batches=UPDATES))

    def _settle(self, job: VersionJob, outcome: Outcome) -> None:
        self.account.settled.add(job.path)
        self._report(self.versions.close(job.step, outcome))

    def _count_rest(self) -> None:
        for job in self.jobs:
            if job.path not in self.account.settled:
                self.versions.close(job.step, Outcome(job.path, "not_tried"))
        order = {step.version.path: index for index, step in enumerate(self.migration.steps())}
        self.versions.versions.sort(key=lambda row: order[f"{row['model']}/{row['version']}"])

    def _label(self, jobs: Sequence[VersionJob | Staged]) -> str:
        return jobs[0].path if len(jobs) == 1 else f"{len(jobs)} versions"


@run_flow(PLACES, MIGRATE)
def migrate(source: Text, dest: Text, **asked: Any) -> Any:
    """Bring the models of the registry `source` into the registry `dest`, as weights.

    Returns its `RunResult`; ends Failed (`RunFailedError`) where a version was rejected or failed and
    that is not acknowledged.
    """
    source, dest = os.fspath(source), os.fspath(dest)
    options = build_options(chosen(CONTENT, asked))
    include, exclude = list(asked["include"]), list(asked["exclude"])
    refuse_secrets(source, dest)
    settings = RunSettings.of(asked)
    registries = Registries(source, dest, asked["source_layout"], asked["layout"])
    with join_run(asked["run_id"] or new_run_id(), settings) as live:
        here, there = registries.open(live.sides)
        here.check_readable()
        there.check_writable()
        # Before anything is made at DEST.
        if not here.has_models(lambda name: wanted_names(include, exclude, name)):
            raise UsageError(f"no models to migrate in SOURCE: {here.uri}")
        home = there.home()
        request = RunRequest(source, home, options, "migrate")
        with running(live, request, settings) as run:
            plan = step(
                live,
                "compare registries",
                lambda: prepare(here, there, include, exclude, asked["versions"], options),
            )
            tally = MigrationTally(live.run_id, source, dest, home=home)
            memory = VersionMemory(live.opened_plan, here.uri, plan, asked)
            return Migrating(run, tally, memory, registries, plan).carry_out()
