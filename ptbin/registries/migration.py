"""A migration before anything is written: both registries opened and compared, each version planned."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ptbin.catalog.checks import refuse_nested
from ptbin.errors import UsageError
from ptbin.options import ConvertOptions
from ptbin.registries import is_registry_uri, open_registry
from ptbin.registries.base import Registry
from ptbin.registries.contents import Contents, plan_contents
from ptbin.registries.planning import (
    Migration,
    ModelPlan,
    Step,
    Versions,
    plan_migration,
    wanted_names,
)
from ptbin.stores import NO_OPTIONS, Place, Sides, identity_text
from ptbin.stores.copying import copy_file, find_in_place

ADVICE = "move it away, or choose another DEST"


@dataclass(frozen=True, slots=True)
class Registries:
    """The two sides of a migration, as every process of the run opens them."""

    source: str
    dest: str
    source_layout: str | None = None
    dest_layout: str | None = None

    def open(self, sides: Sides = NO_OPTIONS) -> tuple[Registry, Registry]:
        """Both sides. Where DEST is not a directory registry, its layout is taken for SOURCE's.

        Raises:
            UsageError: from `open_registry`, or one side lies in the other.
        """
        source_layout, dest_layout = self.source_layout, self.dest_layout
        if is_registry_uri(self.dest) and not is_registry_uri(self.source) and source_layout is None:
            source_layout, dest_layout = dest_layout, None
        if self.source.rstrip("/") == self.dest.rstrip("/"):
            raise UsageError(f"the registries are the same: {self.source}")
        if not is_registry_uri(self.source) and not is_registry_uri(self.dest):
            refuse_nested("the registries", sides.source_at(self.source), sides.dest_at(self.dest))
        return (
            open_registry(self.source, source_layout, sides.source_options),
            open_registry(self.dest, dest_layout, sides.dest_options),
        )


def prepare(
    source: Registry,
    dest: Registry,
    include: Sequence[str],
    exclude: Sequence[str],
    versions: Versions,
    options: ConvertOptions,
) -> Migration:
    """The plan of a migration: what each wanted version comes to.

    Raises:
        UsageError: no model of that name.
        StorageError: either side failed.
    """
    models = source.models(lambda name: wanted_names(include, exclude, name))
    if not models:
        raise UsageError(f"no models to migrate in SOURCE: {source.uri}")
    existing = dest.existing([model.name for model in models])
    migration = plan_migration(models, existing, source.uri, dest, versions, options.fingerprint())
    plans = []
    for plan in migration.models:
        beside, left = source.loose_files(plan.path)
        lost = [f"file {path}: it belongs to no version" for path in left]
        plans.append(replace(plan, beside=beside, not_kept=(*plan.not_kept, *lost)))
    return replace(migration, models=tuple(plans))


def plan_version(
    source: Registry,
    dest: Registry,
    step: Step,
    plan: ModelPlan,
    options: ConvertOptions,
    sides: Sides = NO_OPTIONS,
) -> Contents:
    """What becomes of a version's files. Reads the index of each checkpoint, and writes nothing.

    Raises:
        OutputExistsError: a file is in the way that no migration brought.
        CheckpointError, OutputCollisionError: as `plan_contents`.
    """
    dest.check_place(plan.existing, step.version, step.dest_version)
    contents = plan_contents(source.folder(step.version), dest.style, options)
    folder = dest.model_folder(plan.path)
    if folder is None:
        return replace(contents, beside=contents.with_beside(plan.beside))
    for found, place, may_replace in _beside(plan, dest, folder, sides):
        find_in_place(found, place, may_replace, advice=ADVICE)
    return contents


def bring_along(
    plan: ModelPlan, dest: Registry, sides: Sides, progress: Callable[[int], None]
) -> dict[str, str]:
    """Copy the files of a model and of no version; what each is now, by its path. The same file stays.

    Raises:
        OutputExistsError: another file is at the place of one, and no migration brought it.
    """
    folder = dest.model_folder(plan.path)
    brought = {}
    if folder is not None:
        for found, place, may_replace in _beside(plan, dest, folder, sides):
            copied = copy_file(found, place, progress=progress, may_replace=may_replace, advice=ADVICE)
            brought[place.relative_to(folder)] = identity_text(copied.identity)
    return brought


def _beside(
    plan: ModelPlan, dest: Registry, folder: Place, sides: Sides
) -> Iterator[tuple[Place, Place, Callable[[str], bool]]]:
    """Where each such file lies, where it goes, and whether the one there is what a migration brought."""
    known = dest.known_files(plan.path) if plan.beside else {}
    for uri, path in plan.beside:
        yield sides.source_at(uri), folder / path, partial(operator.eq, known.get(path))
