"""What registries are made of: models, their versions, what belongs to a version. Frozen values, pure.

Names, tags and aliases come from people and programs elsewhere: nothing here becomes a path unchecked.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Metric", "Model", "Origin", "RunLink", "Version", "natural_order"]

FINGERPRINT_DIGITS = 32


@dataclass(frozen=True, slots=True)
class RunLink:
    """The training run that a version came from, as the source registry knows it."""

    run_id: str
    name: str = ""
    experiment: str = ""
    url: str = ""
    """A page for people, where the registry has one."""


@dataclass(frozen=True, slots=True)
class Metric:
    """The last value of one metric. `on_version`: of the version itself, not only of its run."""

    key: str
    value: float
    step: int = 0
    timestamp: int = 0
    """Milliseconds since 1970."""
    on_version: bool = False

    def to_json(self) -> dict[str, Any]:
        # JSON has no NaN; a text survives every parser.
        value: Any = self.value if math.isfinite(self.value) else str(self.value)
        return {**asdict(self), "value": value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Metric:
        return cls(
            str(data["key"]),
            float(data["value"]),
            int(data.get("step", 0)),
            int(data.get("timestamp", 0)),
            bool(data.get("on_version", False)),
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a version was taken from, by an earlier migration or this one.

    Attributes:
        registry, model, version: its place there, as it was called then.
        fingerprint: of its content there and of the options of the conversion.
    """

    registry: str
    model: str
    version: str
    fingerprint: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Origin:
        return cls(*(str(data.get(name, "")) for name in ("registry", "model", "version", "fingerprint")))


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a model.

    Attributes:
        revision: text that changes when its content may have; equal texts mean equal content.
        source: what its registry calls the place of its files.
        uri: of the version, for people.
        created: ISO 8601, empty where unknown.
        stage: a lifecycle stage of MLflow's, from before aliases.
        origin: set where a migration put it there.
        problem: why it cannot be read whole, in its store's words.
        run, metrics, params: filled by `Registry.detail`.
    """

    model: str
    version: str
    revision: str
    source: str = ""
    uri: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    created: str = ""
    stage: str = ""
    origin: Origin | None = None
    problem: str = ""
    run: RunLink | None = None
    metrics: tuple[Metric, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """`model/version`: how summaries name it."""
        return f"{self.model}/{self.version}"

    def fingerprint(self, options_fingerprint: str) -> str:
        """One text for this content converted with those options, wherever the registry was reached."""
        facts = json.dumps([self.model, self.version, self.revision, options_fingerprint])
        return hashlib.sha256(facts.encode()).hexdigest()[:FINGERPRINT_DIGITS]

    def metadata(self) -> dict[str, Any]:
        """What a registry knows of it besides its files, as manifests and `registry.json` keep it."""
        data: dict[str, Any] = {
            "description": self.description,
            "tags": dict(self.tags),
            "aliases": list(self.aliases),
        }
        if self.created:
            data["created"] = self.created
        if self.stage:
            data["stage"] = self.stage
        if self.run is not None:
            data["run"] = asdict(self.run)
        if self.metrics:
            data["metrics"] = [metric.to_json() for metric in self.metrics]
        if self.params:
            data["params"] = dict(self.params)
        return data


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model: its own metadata, its aliases (alias to version), its versions in order.

    `problem`: why it cannot be migrated, whatever DEST is; its versions are then those that are known.
    """

    name: str
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    versions: tuple[Version, ...] = ()
    problem: str = ""

    def by_fingerprint(self) -> dict[str, Version]:
        """The versions that migrations put there; of several with one origin the last."""
        return {version.origin.fingerprint: version for version in self.versions if version.origin}


def natural_order(text: str) -> list[tuple[int, int, str]]:
    """Sorts `2` before `10` and `v2` before `v10`."""
    parts: list[tuple[int, int, str]] = []
    for part in re.findall("[0-9]+|[^0-9]+", text):
        # Numbers as text: a name may have thousands of digits, and `int` refuses that.
        number = part.lstrip("0") if part[0] in "0123456789" else None
        parts.append((1, 0, part) if number is None else (0, len(number), number))
    return parts
