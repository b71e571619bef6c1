"""The first half of a migration: open both registries and compare them. Writes nothing."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ptbin.errors import UsageError
from ptbin.options import ConvertOptions
from ptbin.registries import is_registry_uri, open_registry
from ptbin.registries.base import Registry
from ptbin.registries.planning import Migration, Versions, plan_migration, wanted_names
from ptbin.stores import place_of
from ptbin.stores.copying import find_in_place

__all__ = ["ADVICE", "brought_before", "open_both", "prepare", "refuse_files_of_others"]

ADVICE = "move it away, or choose another DEST"


def open_both(
    source: str,
    dest: str,
    source_layout: str | None,
    dest_layout: str | None,
    source_options: Mapping[str, Any],
    dest_options: Mapping[str, Any],
) -> tuple[Registry, Registry]:
    """Both sides. Where DEST is no directory registry, its layout is taken for SOURCE's.

    Raises:
        UsageError: from `open_registry`, or one side lies in the other.
    """
    if is_registry_uri(dest) and not is_registry_uri(source) and source_layout is None:
        source_layout, dest_layout = dest_layout, None
    own, other = dest.rstrip("/") + "/", source.rstrip("/") + "/"
    if own.startswith(other) or other.startswith(own):
        raise UsageError(f"the registries lie in one another: {source}, {dest}")
    return open_registry(source, source_layout, source_options), open_registry(
        dest, dest_layout, dest_options
    )


def prepare(
    source: Registry,
    dest: Registry,
    include: Sequence[str],
    exclude: Sequence[str],
    versions: Versions,
    options: ConvertOptions,
) -> Migration:
    """What each wanted version comes to.

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
        folder = source.model_files(plan.model.name)
        files = () if folder is None else folder.files or ()
        beside = (
            tuple((posixpath.join(folder.uri, path), path) for path in files) if folder is not None else ()
        )
        left = tuple(
            f"file {path}: it belongs to no version" for path in source.model_files_left(plan.model.name)
        )
        plans.append(replace(plan, beside=beside, not_kept=(*plan.not_kept, *left)))
    return replace(migration, models=tuple(plans))


def brought_before(known: Mapping[str, str], path: str) -> Callable[[str], bool]:
    """Whether a file of a model is still what a migration brought: `copy_file`'s `may_replace`."""
    return lambda identity: known.get(path) == identity


def refuse_files_of_others(
    dest: Registry,
    model: str,
    beside: Sequence[tuple[str, str]],
    source_options: Mapping[str, Any],
    dest_options: Mapping[str, Any],
) -> None:
    """Look at the places of a model's own files before any of its versions is written.

    Args:
        beside: (URI, path in the model's folder) of each.

    Raises:
        OutputExistsError: another file is at the place of one, and no migration brought it.
    """
    folder = dest.model_folder(model)
    if folder is None or not beside:
        return
    known = dest.known_files(model)
    for uri, path in beside:
        find_in_place(
            place_of(uri, source_options),
            folder.place(dest_options) / path,
            brought_before(known, path),
            advice=ADVICE,
        )
