"""What a migration would do: source models and what the destination has, in; steps and losses out. Pure.

Until it is cut over, the source leads: descriptions, tags and aliases there are brought along again by every
run. What others put into the destination stays: an alias of a version from elsewhere is not moved, tags
that the source does not have are not removed, a version that came from another registry is not written over.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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

    @classmethod
    def refused(cls, version: Version, reason: str, detail: str, fingerprint: str = "") -> Step:
        return cls(version, "refused", "", fingerprint, reason=reason, detail=detail)

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
    """One model: its metadata as it is to be, the steps in order, and what changes in what is there already.

    Attributes:
        existing: the model as the destination has it; without versions where it has none.
        aliases: alias to version there, of versions that are up to date, to be set.
        outdated: (version there, the source's) whose description or tags differ.
        updates_model: whether its own description or tags differ.
        not_kept: what of the model stays behind (aliases, files), and why.
        beside: (URI, path) of files that belong to the model and to no version.
        problem: why nothing of it can be migrated.
    """

    model: Model
    existing: Model
    steps: tuple[Step, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    outdated: tuple[tuple[str, Version], ...] = ()
    updates_model: bool = False
    not_kept: tuple[str, ...] = ()
    beside: tuple[tuple[str, str], ...] = ()
    problem: str = ""

    @property
    def path(self) -> str:
        """What it is called in outcomes."""
        return self.model.name

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
    source_uri: str,
    dest: Registry,
    versions: Versions,
    options_fingerprint: str,
) -> Migration:
    """What each version comes to. Raises nothing: what cannot be is `refused`."""
    plans = []
    taken: dict[str, str] = {}
    for model in models:
        there = existing.get(model.name, Model(model.name))
        problem = dest.name_problem(model.name)
        reason = "unsafe_path"
        other = taken.setdefault(model.name.casefold(), model.name)
        if problem is None and dest.folds_case and other != model.name:
            problem = f"{other} and {model.name} would be one where the store ignores case"
        for broken in (there.problem, model.problem):
            if broken:
                problem, reason = broken, "registry_error"
        if problem is not None:
            steps = tuple(Step.refused(version, reason, problem) for version in _choose(model, versions))
            plans.append(ModelPlan(model, there, steps, problem=problem))
            continue
        is_there = model.name in existing
        plans.append(
            _plan_model(model, there, source_uri, dest, versions, options_fingerprint, is_there=is_there)
        )
    return Migration(tuple(plans), tuple(dest.never_kept()))


def _plan_model(
    model: Model,
    there: Model,
    source_uri: str,
    dest: Registry,
    versions: Versions,
    options_fingerprint: str,
    *,
    is_there: bool,
) -> ModelPlan:
    chosen = _choose(model, versions)
    done = there.by_fingerprint()
    prints = {version.version: version.fingerprint(options_fingerprint) for version in chosen}
    fresh = [version for version in chosen if prints[version.version] not in done and not version.problem]
    named = dest.name_versions(there if is_there else None, fresh)
    names = {version.version: name for version, name in zip(fresh, named, strict=True)}
    by_name = {version.version: version for version in there.versions}
    taken = {*by_name, *(name.text for name in named if not name.problem)}
    keepable = _Aliases(there, source_uri, set(prints.values()), dest, taken)
    steps = []
    aliases: dict[str, str] = {}
    outdated = []
    for version in chosen:
        fingerprint = prints[version.version]
        if version.problem:
            steps.append(Step.refused(version, "storage_error", version.problem, fingerprint))
            continue
        known = done.get(fingerprint)
        if known is None:
            name = names[version.version]
            reason, problem = "unsafe_path", name.problem
            if not problem and (old := by_name.get(name.text)) is not None:
                reason, problem = "output_collision", _not_ours(old, version, source_uri)
            if problem:
                steps.append(Step.refused(version, reason, problem, fingerprint))
                continue
            lost = dest.not_kept(version)
            if name.text != version.version:
                lost.insert(0, f"version {version.version} becomes {name.text}")
            mine = keepable.of(version)
            steps.append(Step(version, "migrate", name.text, fingerprint, mine, tuple(lost)))
            continue
        mine = keepable.of(version)
        steps.append(Step(version, "up_to_date", known.version, fingerprint, mine))
        aliases |= {alias: known.version for alias in mine if there.aliases.get(alias) != known.version}
        if _differs(known.description, known.tags, version.description, version.tags):
            outdated.append((known.version, version))
    left = {version.version for version in model.versions} - prints.keys()
    lost_of_model = [
        f"alias {alias}: version {target} is not taken along"
        for alias, target in sorted(model.aliases.items())
        if target in left
    ]
    if not model.versions and not is_there:
        lost_of_model.append("it is registered there without versions, so there is nothing to migrate")
    updates = is_there and _differs(there.description, there.tags, model.description, model.tags)
    return ModelPlan(
        model, there, tuple(steps), aliases, tuple(outdated), updates, (*lost_of_model, *keepable.lost)
    )


def _not_ours(old: Version, version: Version, source_uri: str) -> str:
    """Why a registered version may not be written over by this one; empty: it is an earlier state of it."""
    if old.origin is None:
        return f"version {old.version} is there already and does not come from a migration"
    if (old.origin.model, old.origin.version) != (version.model, version.version):
        return f"version {old.version} is there already: it was {old.origin.model}/{old.origin.version}"
    if old.origin.registry != source_uri:
        return (
            f"version {old.version} is there already and comes from {old.origin.registry}: give each source "
            "its own DEST, or remove that version there"
        )
    return ""


class _Aliases:
    """Which of a model's aliases are set in the destination; `lost`: those that are not, and why."""

    def __init__(
        self,
        there: Model,
        source_uri: str,
        fingerprints: Collection[str],
        dest: Registry,
        names: Collection[str],
    ) -> None:
        self._dest = dest
        self._names = names
        self.lost: list[str] = []
        # Of the same content, or of the same registry: then the alias may follow where it leads there.
        own = {
            version.version
            for version in there.versions
            if version.origin is not None
            and (version.origin.fingerprint in fingerprints or version.origin.registry == source_uri)
        }
        self._foreign = {alias: version for alias, version in there.aliases.items() if version not in own}

    def of(self, version: Version) -> tuple[str, ...]:
        kept = []
        for alias in version.aliases:
            if alias in self._foreign:
                self.lost.append(
                    f"alias {alias} of version {version.version}: there it is on version "
                    f"{self._foreign[alias]}, which does not come from here"
                )
            elif problem := self._dest.alias_problem(alias, self._names):
                self.lost.append(f"alias {alias} of version {version.version}: {problem}")
            else:
                kept.append(alias)
        return tuple(kept)


def _choose(model: Model, versions: Versions) -> list[Version]:
    if versions == "latest":
        return list(model.versions[-1:])
    if versions == "aliased":
        return [version for version in model.versions if version.aliases]
    return list(model.versions)


def _differs(
    description: str, tags: Mapping[str, str], wanted_description: str, wanted: Mapping[str, str]
) -> bool:
    """Whether the source has something that is otherwise there; what it lacks is not a difference."""
    if wanted_description and wanted_description != description:
        return True
    return any(tags.get(key) != value for key, value in wanted.items() if not key.startswith("ptbin."))
