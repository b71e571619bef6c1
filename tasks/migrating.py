"""The tasks of a migration: compare two registries, move versions' files, make versions known.

A version counts once `register_batch` has made it known; until then no consumer looks at its files. What
goes wrong with one version becomes its outcome and the batch goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptbin.catalog import Job
from ptbin.manifests.manifest import manifest_uri
from ptbin.options import ConvertOptions
from ptbin.registries import Model, ModelPlan, Registration, Registry, Step, Version
from ptbin.registries.contents import NoCheckpointError
from ptbin.registries.migration import ADVICE, Registries, brought_before, plan_version
from ptbin.registries.transfer import files_of, transfer
from ptbin.runs.outcomes import Converted, Outcome, Staged, Written
from ptbin.runs.retrying import is_transient
from ptbin.stores import Place, identity_text
from ptbin.stores.copying import copy_file
from tasks.batches import batch_task
from tasks.live import LiveRun

__all__ = ["VersionJob", "model_of", "register_batch", "transfer_batch", "update_models"]


@dataclass(frozen=True, slots=True)
class VersionJob(Job):
    """One version that is to be migrated.

    `beside`: (URI, path) of files that belong to its model and to no version.
    """

    step: Step | None = None
    model: Model | None = None
    existing: Model | None = None
    beside: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, plan: ModelPlan, step: Step) -> VersionJob:
        bare = replace(plan.model, versions=())
        uri = step.version.uri
        return cls(
            uri,
            0,
            "",
            step.version.path,
            certain=True,
            identity=None,
            step=step,
            model=bare,
            existing=plan.existing,
            beside=plan.beside,
        )

    @property
    def parts(self) -> tuple[Step, Model, Model]:
        assert self.step is not None
        assert self.model is not None
        assert self.existing is not None
        return self.step, self.model, self.existing


def _open_sides(live: LiveRun, registries: Registries, **values: Any) -> dict[str, Any]:
    source, dest = registries.open(live.sides)
    return {**values, "source": source, "dest": dest}


def _open_dest(live: LiveRun, registries: Registries) -> dict[str, Any]:
    return {"dest": registries.open(live.sides)[1]}


@batch_task("transfer versions", opens=_open_sides)
def transfer_batch(
    live: LiveRun,
    job: VersionJob,
    options: ConvertOptions,
    source: Registry,
    dest: Registry,
) -> Outcome:
    """Put the files of a version where they belong: `staged` where all are proven."""
    try:
        return _transfer(live, job, source, dest, options)
    except NoCheckpointError as error:
        return Outcome(job.path, "not_a_checkpoint", detail=str(error))


def _transfer(
    live: LiveRun,
    job: VersionJob,
    source: Registry,
    dest: Registry,
    options: ConvertOptions,
) -> Outcome:
    step, _, existing = job.parts
    contents = plan_version(source, dest, step, existing, job.beside, options, live.sides)
    version = source.detail(step.version)
    place = dest.place(existing, version, step.dest_version, step.fingerprint)
    try:
        done = transfer(
            contents,
            place.folder,
            options,
            current=place.current,
            sides=live.sides,
            annotations=_annotations(source, step, version),
            run_id=live.run_id,
            progress=live.moved,
        )
    except Exception as error:
        if not is_transient(error):
            dest.abandon(place)
        raise
    parts = tuple(
        (
            each.job.path,
            Converted.from_manifest(
                each.published.manifest, manifest_uri((place.final / each.job.dest_uri).uri)
            ),
            int(each.published.manifest["source"]["size"]),
        )
        for each in done
    )
    written = Written(
        version,
        place.token,
        tuple(manifest_uri(each.job.dest_uri) for each in done),
        parts,
        frozenset(each.job.path for each in done if each.fresh),
        len(contents.copies),
        files_of(contents, done),
        contents.left,
    )
    return Outcome(job.path, "staged", written=written)


def _annotations(source: Registry, step: Step, version: Version) -> dict[str, Any]:
    """What the manifest says of the version: the registry's own metadata, and its origin."""
    origin = {
        "registry": source.uri,
        "model": version.model,
        "version": version.version,
        "uri": version.uri,
        "fingerprint": step.fingerprint,
    }
    return {"name": version.model, "origin": origin, **version.metadata()}


def model_of(job: VersionJob) -> str:
    """The model that a version belongs to: its versions are registered together, in order."""
    return job.parts[1].name


@batch_task("register versions", opens=_open_sides, groups=lambda staged: model_of(staged.item))
def register_batch(
    live: LiveRun, versions: Sequence[Staged], source: Registry, dest: Registry
) -> list[Outcome]:
    """Make versions of one model known whose files are there; `converted`."""
    pairs = [
        (staged.item, staged.outcome.written) for staged in versions if staged.outcome.written is not None
    ]
    names = _register(live, pairs, source, dest)
    return [
        Outcome(job.path, "converted", written=replace(facts, dest_version=name))
        for (job, facts), name in zip(pairs, names, strict=True)
    ]


def _register(
    live: LiveRun, pairs: Sequence[tuple[VersionJob, Written]], source: Registry, dest: Registry
) -> list[str]:
    first, _ = pairs[0]
    _, model, _ = first.parts
    brought: dict[str, str] = {}
    if first.beside and (folder := dest.model_folder(model.name)) is not None:
        brought = _bring_along(live, first.beside, folder, dest.known_files(model.name))
    ready = [
        Registration(
            facts.version,
            job.parts[0].dest_version,
            job.parts[0].fingerprint,
            facts.token,
            facts.manifests,
            job.parts[0].aliases,
            source.uri,
            live.run_id,
            facts.files,
        )
        for job, facts in pairs
    ]
    names = dest.register(model, ready)
    if brought:
        dest.remember_files(model.name, brought)
    return names


def _bring_along(
    live: LiveRun, files: Sequence[tuple[str, str]], folder: Place, known: Mapping[str, str]
) -> dict[str, str]:
    """Copy files of the model; what each is now, by its path. One that holds the same already stays.

    Raises:
        OutputExistsError: another file is at the place of one, and no migration brought it.
    """
    brought = {}
    for uri, path in files:
        copied = copy_file(
            live.source_at(uri),
            folder / path,
            progress=live.moved,
            may_replace=brought_before(known, path),
            advice=ADVICE,
        )
        brought[path] = identity_text(copied.identity)
    return brought


@batch_task("update models", opens=_open_dest)
def update_models(_live: LiveRun, plan: ModelPlan, dest: Registry) -> Outcome:
    """Bring description, tags and aliases of what is registered in step."""
    dest.update(replace(plan.model, versions=()), plan.aliases, plan.outdated)
    return Outcome(plan.path, "updated")
