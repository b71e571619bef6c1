"""The tasks of a migration: move versions' files, register versions, bring models in step.

A version counts once `register_batch` has registered it; until then no consumer looks at its files. What
goes wrong with one version becomes its outcome and the batch goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptbin.manifests.manifest import manifest_uri
from ptbin.options import ConvertOptions
from ptbin.registries import ModelPlan, Registration, Registry, Step
from ptbin.registries.contents import NoCheckpointError
from ptbin.registries.migration import Registries, bring_along, plan_version
from ptbin.registries.transfer import files_of, transfer
from ptbin.runs.outcomes import Converted, Outcome, Part, Staged, Written
from ptbin.runs.retrying import is_transient
from tasks.batches import batch_task
from tasks.live import LiveRun


@dataclass(frozen=True, slots=True)
class VersionJob:
    """One version that is to be migrated; `plan` is that of its model, without steps and versions."""

    step: Step
    plan: ModelPlan

    @property
    def path(self) -> str:
        return self.step.version.path


def model_of(job: VersionJob) -> str:
    """The model that a version belongs to: its versions are registered together, in order."""
    return job.plan.path


def _open_sides(live: LiveRun, registries: Registries, **values: Any) -> dict[str, Any]:
    source, dest = registries.open(live.sides)
    return {**values, "source": source, "dest": dest}


def _open_dest(live: LiveRun, registries: Registries) -> dict[str, Any]:
    return {"dest": registries.open(live.sides)[1]}


@batch_task("transfer versions", opens=_open_sides)
def transfer_batch(
    live: LiveRun, job: VersionJob, options: ConvertOptions, source: Registry, dest: Registry
) -> Outcome:
    """Put the files of a version where they belong: `staged` where all are proven."""
    step, plan = job.step, job.plan
    try:
        contents = plan_version(source, dest, step, plan, options, live.sides)
    except NoCheckpointError as error:
        return Outcome(job.path, "not_a_checkpoint", detail=str(error))
    version = source.detail(step.version)
    place = dest.place(plan.existing, version, step.dest_version, step.fingerprint)
    names = {"registry": source.uri, "model": version.model, "version": version.version, "uri": version.uri}
    origin = {**names, "fingerprint": step.fingerprint}
    try:
        done = transfer(
            contents,
            place.folder,
            options,
            current=place.current,
            sides=live.sides,
            annotations={"name": version.model, "origin": origin, **version.metadata()},
            run_id=live.run_id,
            progress=live.moved,
        )
    except Exception as error:
        if not is_transient(error):
            dest.abandon(place)
        raise
    registration = Registration(
        version,
        step.dest_version,
        step.fingerprint,
        place.token,
        tuple(manifest_uri(each.job.dest_uri) for each in done),
        step.aliases,
        source.uri,
        live.run_id,
        files_of(contents, done),
    )
    parts = []
    for each in done:
        manifest = each.published.manifest
        facts = Converted.from_manifest(manifest, manifest_uri((place.final / each.job.dest_uri).uri))
        parts.append(Part(each.job.path, int(manifest["source"]["size"]), facts, each.fresh))
    written = Written(registration, tuple(parts), len(contents.copies), contents.left)
    return Outcome(job.path, "staged", written=written)


@batch_task("register versions", opens=_open_dest, groups=lambda staged: model_of(staged.item))
def register_batch(live: LiveRun, versions: Sequence[Staged], dest: Registry) -> list[Outcome]:
    """Register versions of one model whose files are there: `converted`."""
    plan: ModelPlan = versions[0].item.plan
    ready = [staged.outcome.written for staged in versions if staged.outcome.written is not None]
    brought = bring_along(plan, dest, live.sides, live.moved)
    names = dest.register(plan.model, [each.registration for each in ready], brought)
    return [
        Outcome(staged.path, "converted", written=replace(each, dest_version=name))
        for staged, each, name in zip(versions, ready, names, strict=True)
    ]


@batch_task("update models", opens=_open_dest)
def update_models(_live: LiveRun, plan: ModelPlan, dest: Registry) -> Outcome:
    """Bring description, tags and aliases of what is registered in step."""
    dest.update(plan.model, plan.aliases, plan.outdated)
    return Outcome(plan.path, "updated")
