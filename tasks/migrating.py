"""The tasks of a migration: compare two registries, move versions' files, make versions known.

A version counts once `register_batch` has made it known; until then its files lie where nobody looks. What
goes wrong with one version becomes its outcome and the batch goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptbin.catalog import Job
from ptbin.manifests.manifest import manifest_uri
from ptbin.options import ConvertOptions
from ptbin.registries import Folder, Model, ModelPlan, Registration, Registry, Step, Version
from ptbin.registries.migration import (
    ADVICE,
    brought_before,
    open_both,
    refuse_files_of_others,
)
from ptbin.registries.transfer import (
    NoCheckpointError,
    examine,
    files_of,
    own_first,
    scratch,
    transfer,
)
from ptbin.runs.outcomes import Converted, Outcome, Staged, Written
from ptbin.runs.retrying import is_transient
from ptbin.stores import identity_text
from ptbin.stores.copying import copy_file
from tasks.batches import batch_task
from tasks.live import LiveRun

__all__ = [
    "Registries",
    "VersionJob",
    "model_of",
    "register_batch",
    "transfer_batch",
    "update_models",
]


@dataclass(frozen=True, slots=True)
class Registries:
    """The two sides of a migration, as every process of the run opens them."""

    source: str
    dest: str
    source_layout: str | None = None
    dest_layout: str | None = None

    def open(self, live: LiveRun) -> tuple[Registry, Registry]:
        return open_both(
            self.source,
            self.dest,
            self.source_layout,
            self.dest_layout,
            live.source_options,
            live.dest_options,
        )


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
    source, dest = registries.open(live)
    return {**values, "source": source, "dest": dest}


def _open_dest(live: LiveRun, registries: Registries) -> dict[str, Any]:
    return {"dest": registries.open(live)[1]}


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
    version = source.detail(step.version)
    folder = source.folder(version)
    style = dest.style
    with scratch({**live.source_options, **folder.options}) as (source_options,):
        contents = examine(folder, style, options, source_options)
        refuse_files_of_others(dest, version.model, job.beside, live.source_options, live.dest_options)
        place = dest.place(existing, version, step.dest_version, step.fingerprint)
        try:
            with scratch({**live.dest_options, **place.folder.options}) as (dest_options,):
                beside = () if dest.model_folder(version.model) is not None else job.beside
                extra = own_first(contents, beside)
                done = transfer(
                    contents,
                    folder,
                    place.folder,
                    options,
                    current=place.current,
                    source_options=source_options,
                    dest_options=dest_options,
                    annotations=_annotations(source, step, version),
                    run_id=live.run_id,
                    progress=live.moved,
                    extra=extra,
                )
        except Exception as error:
            if not is_transient(error):
                dest.abandon(place)
            raise
    base = place.final.uri.rstrip("/")
    parts = tuple(
        (
            each_one.path,
            Converted.from_manifest(each_one.published.manifest, manifest_uri(f"{base}/{each_one.output}")),
            int(each_one.published.manifest["source"]["size"]),
        )
        for each_one in done
    )
    written = Written(
        version,
        place.token,
        tuple(manifest_uri(each_one.output) for each_one in done),
        parts,
        frozenset(each_one.path for each_one in done if each_one.fresh),
        len(contents.others),
        files_of(contents, done, [path for _, path in extra]),
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
    live: LiveRun, files: Sequence[tuple[str, str]], folder: Folder, known: Mapping[str, str]
) -> dict[str, str]:
    """Copy files of the model; what each is now, by its path. One that holds the same already stays.

    Raises:
        OutputExistsError: another file is at the place of one, and no migration brought it.
    """
    brought = {}
    for uri, path in files:
        copied = copy_file(
            live.source_at(uri),
            folder.place(live.dest_options) / path,
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
