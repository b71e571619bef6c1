"""What a migration would do: source models and what the destination has, in; steps and losses out. Pure.

Until it is cut over, the source leads: descriptions, tags and aliases there are brought along again by every
run. What others put into the destination stays: an alias that somebody else's version has is not moved, tags
that the source does not have are not removed.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ptbin.errors import UsageError
from ptbin.registries.base import Registry
from ptbin.registries.values import Model, Version

__all__ = ["Migration", "ModelPlan", "Step", "Versions", "plan_migration", "wanted_names"]

Versions = Literal["all", "latest", "aliased"]


@dataclass(frozen=True, slots=True)
class Step:
    """One version: `migrate` it, it is `up_to_date`, or it cannot be (`refused`, for the `reason`).

    `not_kept`: what of it the destination has no room for.
    """

    version: Version
    action: Literal["migrate", "up_to_date", "refused"]
    dest_version: str
    fingerprint: str
    aliases: tuple[str, ...] = ()
    not_kept: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "model": self.version.model,
            "version": self.version.version,
            "dest_version": self.dest_version or None,
            "action": self.action,
            "aliases": list(self.aliases),
            "not_kept": list(self.not_kept),
        }
        if self.reason:
            row |= {"reason": self.reason, "detail": self.detail}
        return row


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model: its metadata as it is to be, the steps in order, and what changes of what is there already.

    Attributes:
        existing: the model as the destination has it; without versions where it has none.
        aliases: alias to version there, of versions that are up to date, to be set.
        outdated: (version there, the source's) whose description or tags differ.
        updates_model: whether its own description or tags differ.
        not_kept: aliases that stay behind, and why.
        beside: (URI, path) of files that belong to the model and to no version.
    """

    model: Model
    existing: Model
    steps: tuple[Step, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    outdated: tuple[tuple[str, Version], ...] = ()
    updates_model: bool = False
    not_kept: tuple[str, ...] = ()
    beside: tuple[tuple[str, str], ...] = ()

    @property
    def needs_update(self) -> bool:
        return bool(self.aliases or self.outdated or self.updates_model)


@dataclass(frozen=True, slots=True)
class Migration:
    """All of it, and what of no version can be kept."""

    models: tuple[ModelPlan, ...]
    never_kept: tuple[str, ...]

    def steps(self) -> list[Step]:
        return [step for plan in self.models for step in plan.steps]


def wanted_names(include: Sequence[str], exclude: Sequence[str], name: str) -> bool:
    """Whether a model's name is to be migrated; globs as a shell has them."""
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return False
    return not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)


def plan_migration(
    models: Sequence[Model],
    existing: Mapping[str, Model],
    dest: Registry,
    versions: Versions,
    options_fingerprint: str,
) -> Migration:
    """What each version comes to. Raises nothing: what cannot be is `refused`."""
    plans = []
    taken: dict[str, str] = {}
    for model in models:
        problem = dest.name_problem(model.name)
        other = taken.setdefault(model.name.casefold(), model.name)
        if problem is None and other != model.name:
            problem = f"{other} and {model.name} would be one where the store does not tell cases apart"
        plans.append(
            _plan_model(model, existing.get(model.name), dest, versions, options_fingerprint, problem)
        )
    return Migration(tuple(plans), tuple(dest.never_kept()))


def _plan_model(
    model: Model,
    existing: Model | None,
    dest: Registry,
    versions: Versions,
    options_fingerprint: str,
    problem: str | None,
) -> ModelPlan:
    there = existing or Model(model.name)
    chosen = _choose(model, versions)
    if problem is not None:
        steps = [Step(version, "refused", "", "", reason="unsafe_path", detail=problem) for version in chosen]
        return ModelPlan(model, there, tuple(steps))
    done = there.by_fingerprint()
    fingerprints = [version.fingerprint(options_fingerprint) for version in chosen]
    fresh = [version for version, print_ in zip(chosen, fingerprints, strict=True) if print_ not in done]
    try:
        names = iter(dest.name_versions(existing, fresh))
    except UsageError as error:
        steps = [
            Step(version, "refused", "", "", reason="unsafe_path", detail=str(error)) for version in chosen
        ]
        return ModelPlan(model, there, tuple(steps))
    foreign = _foreign_aliases(there)
    steps = []
    aliases: dict[str, str] = {}
    outdated = []
    left = {version.version for version in model.versions} - {version.version for version in chosen}
    lost_aliases = [
        f"alias {alias}: version {target} is not taken along"
        for alias, target in sorted(model.aliases.items())
        if target in left
    ]
    for version, fingerprint in zip(chosen, fingerprints, strict=True):
        mine = tuple(alias for alias in version.aliases if alias not in foreign)
        lost_aliases += [
            f"alias {alias} of version {version.version}: there it is on version {foreign[alias]}, "
            "which does not come from here"
            for alias in version.aliases
            if alias in foreign
        ]
        known = done.get(fingerprint)
        if known is None:
            name = next(names)
            lost = dest.not_kept(version)
            if name != version.version:
                lost.insert(0, f"version {version.version} becomes {name}")
            steps.append(Step(version, "migrate", name, fingerprint, mine, tuple(lost)))
            continue
        steps.append(Step(version, "up_to_date", known.version, fingerprint, mine))
        aliases |= {alias: known.version for alias in mine if there.aliases.get(alias) != known.version}
        if _differs(known.description, known.tags, version.description, version.tags):
            outdated.append((known.version, version))
    updates = existing is not None and _differs(there.description, there.tags, model.description, model.tags)
    return ModelPlan(model, there, tuple(steps), aliases, tuple(outdated), updates, tuple(lost_aliases))


def _choose(model: Model, versions: Versions) -> list[Version]:
    if versions == "latest":
        return list(model.versions[-1:])
    if versions == "aliased":
        return [version for version in model.versions if version.aliases]
    return list(model.versions)


def _foreign_aliases(there: Model) -> dict[str, str]:
    """Aliases of versions that no migration put there."""
    own = {version.version for version in there.versions if version.origin is not None}
    return {alias: version for alias, version in there.aliases.items() if version not in own}


def _differs(
    description: str, tags: Mapping[str, str], wanted_description: str, wanted: Mapping[str, str]
) -> bool:
    """Whether the source has something that is otherwise there; what it does not have is no difference."""
    if wanted_description and wanted_description != description:
        return True
    return any(tags.get(key) != value for key, value in wanted.items())
