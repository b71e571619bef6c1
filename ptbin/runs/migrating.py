"""A migration's account: counts of versions, and a row for each version; and its dry run, judged by the same.

A dry run costs what the run pays before it writes: a listing of each version that is to be migrated, and the
index of each of its checkpoints. Nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ptbin.errors import PtbinError
from ptbin.history.failures import read_ledger
from ptbin.options import ConvertOptions
from ptbin.registries import Migration, ModelPlan, Registry, Step, Version, is_registry_uri
from ptbin.registries.contents import NoCheckpointError, is_of_training
from ptbin.registries.migration import plan_version
from ptbin.runs.outcomes import Converted, Outcome
from ptbin.runs.remembering import state_of
from ptbin.runs.tally import Tally
from ptbin.stores import NO_OPTIONS, Sides


@dataclass(slots=True)
class MigrationTally(Tally):
    """Counts are of versions; the entries of what was converted are checkpoints."""

    kind: str = "migrate"
    versions: list[dict[str, Any]] = field(default_factory=list)
    """A row for each version of the plan, in its order, with what became of it."""
    updated: int = 0
    """Models whose metadata was brought in step."""

    def _counted(self) -> list[tuple[str, int]]:
        return [
            ("models updated", self.updated),
            ("without a checkpoint", self.count("not_a_checkpoint")),
            ("not tried", self.count("not_tried")),
        ]

    def close(self, step: Step, outcome: Outcome) -> Outcome:
        """A version has its final outcome: a row for it, and an entry for each checkpoint in it."""
        entry = self.add_version(step.version, outcome)
        row = step.to_json() | {"outcome": entry.kind}
        del row["action"]
        written = outcome.written
        if written is not None and written.dest_version:
            row["dest_version"] = written.dest_version
        elif outcome.kind != "up_to_date":
            row["dest_version"] = None
        if written is not None and written.left:
            row["left_behind"] = list(written.left)
            self.files["left_alone"] += sum(map(is_of_training, written.left))
        if outcome.reason or outcome.detail:
            row |= {"reason": outcome.reason or "no_checkpoint", "detail": outcome.detail}
        self.versions.append(row)
        return entry

    def add_version(self, version: Version, outcome: Outcome) -> Outcome:
        """Count a version. The entry that is returned stands for all of it: `migrated` if it came along."""
        written = outcome.written
        if outcome.kind != "converted" or written is None:
            return self._append(replace(outcome, source=version.uri), state_of(version))
        self.counts["converted"] += 1
        self.files["copied"] += written.copied
        whole = Outcome(version.path, "migrated", source=version.uri, seconds=outcome.seconds)
        for part in written.parts:
            own = replace(whole, path=f"{version.path}/{part.path}", kind="converted")
            self.entries.append(replace(own, nbytes=part.nbytes, converted=part.converted))
        fresh = [part.converted for part in written.parts if part.fresh]
        read, wrote = sum(each.read_nbytes for each in fresh), sum(each.written_nbytes for each in fresh)
        name = f"version {written.dest_version}" if written.dest_version else ""
        nbytes = sum(part.nbytes for part in written.parts)
        return replace(whole, nbytes=nbytes, detail=name, converted=Converted("", (), 0, read, wrote))

    def summary(self, seconds: float) -> dict[str, Any]:
        document = Tally.summary(self, seconds)
        return {
            **document,
            "migrated": document["converted"],
            "converted": sum(1 for entry in self.entries if entry.converted is not None),
            "copied": self.files["copied"],
            "skipped": self.count("not_a_checkpoint"),
            "left_alone": self.files["left_alone"],
            "updated": self.updated,
            "versions": list(self.versions),
        }


def loss_lines(plan: Migration) -> list[str]:
    """What of the source the destination cannot keep, a line each; those of all versions first."""
    lines = list(plan.never_kept) if any(step.action == "migrate" for step in plan.steps()) else []
    for model in plan.models:
        lines += [f"{model.model.name}: {text}" for text in model.not_kept]
        for step in model.steps:
            lines += [f"{step.version.model}: {text}" for text in step.not_kept]
    return lines


def dry_run(
    plan: Migration,
    source: Registry,
    dest: Registry,
    options: ConvertOptions,
    sides: Sides = NO_OPTIONS,
) -> dict[str, Any]:
    """The document of `ptbin migrate --dry-run --json`.

    Each version that would be migrated says what it `writes`, paths below its folder; of shards and split
    checkpoints only the name that they share is known before they are made.
    """
    tally = MigrationTally("", source.uri, dest.uri)
    if not is_registry_uri(dest.uri):  # others hold no history of their runs
        tally.ledger = read_ledger(sides.dest_at(dest.home()), root=source.uri)
    problems = [
        {"source": model.model.name, "reason": "registry_error", "detail": model.problem}
        for model in plan.models
        if model.problem and not model.steps
    ]
    rows: list[dict[str, Any]] = []
    known: list[dict[str, str]] = []
    for model in plan.models:
        for step in model.steps:
            row = _row(source, dest, step, model, options, sides)
            rows.append(row)
            if row["action"] != "refused":
                continue
            refused = Outcome(step.version.path, "rejected", row["reason"], row["detail"])
            entry = tally.add_version(step.version, refused)
            problem = {"source": entry.path, "reason": entry.reason, "detail": entry.detail}
            (known if entry.kind == "known" else problems).append(problem)
    lost = [f"{model.model.name}: {text}" for model in plan.models for text in model.not_kept]
    return {
        "dry_run": True,
        "source": source.uri,
        "dest": dest.uri,
        "versions": rows,
        "not_kept": [*plan.never_kept, *lost],
        "updates": [model.model.name for model in plan.models if model.needs_update],
        "problems": problems,
        "known_problems": known,
    }


def _row(
    source: Registry,
    dest: Registry,
    step: Step,
    plan: ModelPlan,
    options: ConvertOptions,
    sides: Sides,
) -> dict[str, Any]:
    row = step.to_json()
    if step.action != "migrate":
        return row
    try:
        contents = plan_version(source, dest, step, plan, options, sides)
    except PtbinError as error:
        action = "skip" if isinstance(error, NoCheckpointError) else "refused"
        refusal = {"action": action, "dest_version": None, "reason": error.reason, "detail": str(error)}
        return {**row, **refusal}
    return {
        **row,
        "replaces": any(old.version == step.dest_version for old in plan.existing.versions),
        "checkpoints": [job.path for job in contents.conversions],
        "files": len(contents.copies),
        "writes": contents.files(options),
    } | ({"left_behind": list(contents.left)} if contents.left else {})
