"""A migration before anything is written: both registries opened and compared, each version planned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ptbin.errors import UsageError
from ptbin.options import ConvertOptions
from ptbin.registries import is_registry_uri, open_registry
from ptbin.registries.base import Registry
from ptbin.registries.contents import Contents, Pair, plan_contents
from ptbin.registries.planning import Migration, Step, Versions, plan_migration, wanted_names
from ptbin.registries.values import Model
from ptbin.stores import NO_OPTIONS, Sides
from ptbin.stores.copying import find_in_place

__all__ = ["ADVICE", "Registries", "brought_before", "plan_version", "prepare"]

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
        own, other = self.dest.rstrip("/") + "/", self.source.rstrip("/") + "/"
        if own.startswith(other) or other.startswith(own):
            raise UsageError(f"the registries lie in one another: {self.source}, {self.dest}")
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
        name = plan.model.name
        left = tuple(f"file {path}: it belongs to no version" for path in source.model_files_left(name))
        plans.append(replace(plan, beside=source.model_files(name), not_kept=(*plan.not_kept, *left)))
    return replace(migration, models=tuple(plans))


def plan_version(
    source: Registry,
    dest: Registry,
    step: Step,
    existing: Model,
    beside: Sequence[Pair],
    options: ConvertOptions,
    sides: Sides = NO_OPTIONS,
) -> Contents:
    """What becomes of a version's files. Reads the index of each checkpoint, and writes nothing.

    Args:
        existing: the model as DEST has it; `beside`: files of the model and of no version.

    Raises:
        OutputExistsError: a file is in the way that no migration brought.
        CheckpointError, OutputCollisionError: as `plan_contents`.
    """
    name = step.version.model
    dest.check_place(existing, step.version, step.dest_version)
    contents = plan_contents(source.folder(step.version), dest.style, options)
    folder = dest.model_folder(name)
    if folder is None:
        return replace(contents, beside=contents.with_beside(beside))
    known = dest.known_files(name) if beside else {}
    for uri, path in beside:
        may_replace = brought_before(known, path)
        find_in_place(sides.source_at(uri), folder / path, may_replace, advice=ADVICE)
    return contents


def brought_before(known: Mapping[str, str], path: str) -> Callable[[str], bool]:
    """Whether a file of a model is still what a migration brought: `copy_file`'s `may_replace`."""
    return lambda identity: known.get(path) == identity
