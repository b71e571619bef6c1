"""What a migration would do, without doing it: its plan, with each version looked into as the run does first.

Costs what the run pays before it writes: a listing of each version that is to be migrated, and the index of
each of its checkpoints. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptbin.catalog.collisions import suffixes_beside
from ptbin.errors import PtbinError
from ptbin.manifests.manifest import MANIFEST_SUFFIX
from ptbin.options import ConvertOptions
from ptbin.registries.base import Registry
from ptbin.registries.migration import refuse_files_of_others
from ptbin.registries.planning import Migration, ModelPlan, Step
from ptbin.registries.transfer import Contents, NoCheckpointError, examine, own_first, scratch

__all__ = ["dry_run"]


def dry_run(
    plan: Migration,
    source: Registry,
    dest: Registry,
    options: ConvertOptions,
    source_options: Mapping[str, Any],
    dest_options: Mapping[str, Any],
) -> dict[str, Any]:
    """The document of `ptbin migrate --dry-run --json`.

    Each version that would be migrated says what it `writes`, paths below its folder; of shards and split
    checkpoints only the name that they share is known before they are made.
    """
    sides = (source_options, dest_options)
    rows = [_row(source, dest, step, model, options, *sides) for model in plan.models for step in model.steps]
    problems = [
        {"source": model.model.name, "reason": "registry_error", "detail": model.problem}
        for model in plan.models
        if model.problem and not model.steps
    ]
    problems += [
        {"source": f"{row['model']}/{row['version']}", "reason": row["reason"], "detail": row["detail"]}
        for row in rows
        if row["action"] == "refused"
    ]
    lost = [f"{model.model.name}: {text}" for model in plan.models for text in model.not_kept]
    return {
        "dry_run": True,
        "source": source.uri,
        "dest": dest.uri,
        "versions": rows,
        "not_kept": [*plan.never_kept, *lost],
        "updates": [model.model.name for model in plan.models if model.needs_update],
        "problems": problems,
    }


def _row(
    source: Registry,
    dest: Registry,
    step: Step,
    plan: ModelPlan,
    options: ConvertOptions,
    source_options: Mapping[str, Any],
    dest_options: Mapping[str, Any],
) -> dict[str, Any]:
    row = step.to_json()
    if step.action != "migrate":
        return row
    try:
        dest.check_place(plan.existing, step.version, step.dest_version)
        refuse_files_of_others(dest, plan.model.name, plan.beside, source_options, dest_options)
        folder = source.folder(step.version)
        with scratch({**source_options, **folder.options}) as (options_there,):
            contents = examine(folder, dest.style, options, options_there)
    except PtbinError as error:
        action = "skip" if isinstance(error, NoCheckpointError) else "refused"
        refusal = {"action": action, "dest_version": None, "reason": error.reason, "detail": str(error)}
        return {**row, **refusal}
    beside = () if dest.model_folder(plan.model.name) is not None else plan.beside
    return {
        **row,
        "replaces": any(old.version == step.dest_version for old in plan.existing.versions),
        "checkpoints": [path for path, *_ in contents.checkpoints],
        "files": len(contents.others),
        "writes": _files_of(contents, options) + [path for _, path in own_first(contents, beside)],
    } | ({"left_behind": list(contents.left)} if contents.left else {})


def _files_of(contents: Contents, options: ConvertOptions) -> list[str]:
    found = [output for _, output in contents.others]
    for *_, output in contents.checkpoints:
        found += [output + suffix for suffix in ("", *suffixes_beside(options), MANIFEST_SUFFIX)]
    return sorted(found)
