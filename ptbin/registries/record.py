"""`registry.json`: what a directory registry knows of one model besides its files. Pure.

    {"schema_version": 1, "name": "resnet", "description": "", "tags": {}, "aliases": {"champion": "3"},
     "versions": [{"version": "3", "path": "3", "origin": {...}, "manifests": ["model.bin.manifest.json"],
                   "description": "", "tags": {}, "run": {...}, "metrics": [...], "params": {...}}]}

A version counts where it is listed here; that is what makes it registered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ptbin.errors import VerificationError
from ptbin.registries.values import Metric, Model, Origin, RunLink, Version, natural_order
from ptbin.values.names import is_plain_path

SCHEMA_VERSION = 1
RECORD = "registry.json"
CLAIM = ".ptbin-unregistered.json"
"""In the folder of a version that is being written, with its origin; goes when the version is registered."""
OWN_FILES = (RECORD, CLAIM)


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version: its folder (a path below the model's), and in it its manifests and all of its files.

    `identities`: what the files were when it was registered, by their paths, as `identity_text` writes it.
    """

    version: Version
    path: str
    manifests: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    identities: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        metadata = self.version.metadata()
        del metadata["aliases"]
        origin = self.version.origin
        return {
            "version": self.version.version,
            "path": self.path,
            **({"origin": origin.to_json()} if origin is not None else {}),
            "manifests": list(self.manifests),
            **({"files": list(self.files)} if self.files else {}),
            **({"identities": dict(self.identities)} if self.identities else {}),
            **metadata,
        }

    def updated(self, source: Version | None) -> VersionRecord:
        """With the description and tags that the source has now; None: as it is."""
        if source is None:
            return self
        version = replace(
            self.version,
            description=source.description or self.version.description,
            tags={**self.version.tags, **source.tags},
        )
        return replace(self, version=version)


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One model's `registry.json`.

    Attributes:
        layout: how files are called there, empty where it does not say.
        files: those of the model's own that were brought along, by path, and what they were then, as
            `identity_text` writes it.
    """

    name: str
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    versions: tuple[VersionRecord, ...] = ()
    layout: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    def row(self, version: str) -> VersionRecord | None:
        """The row of that version."""
        return next((row for row in self.versions if row.version.version == version), None)

    def without_version(self, version: str) -> ModelRecord:
        """The same without this version; aliases stay."""
        return replace(self, versions=tuple(row for row in self.versions if row.version.version != version))

    def with_version(self, record: VersionRecord) -> ModelRecord:
        """The same with this version, in the place of one of its name or behind the others."""
        others = {known.version.version: known for known in self.versions}
        others[record.version.version] = record
        ordered = sorted(others.values(), key=lambda row: natural_order(row.version.version))
        return replace(self, versions=tuple(ordered))

    def updated(self, model: Model, versions: Mapping[str, Version] | None = None) -> ModelRecord:
        """With the description and tags that the source has now, of the model and of these versions."""
        wanted = versions or {}
        return replace(
            self,
            description=model.description or self.description,
            tags={**self.tags, **model.tags},
            versions=tuple(row.updated(wanted.get(row.version.version)) for row in self.versions),
        )

    def to_bytes(self) -> bytes:
        data = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            **({"layout": self.layout} if self.layout else {}),
            "description": self.description,
            "tags": dict(self.tags),
            "aliases": dict(sorted(self.aliases.items())),
            **({"files": dict(sorted(self.files.items()))} if self.files else {}),
            "versions": [record.to_json() for record in self.versions],
        }
        return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")

    @classmethod
    def from_bytes(cls, data: bytes, uri: str) -> ModelRecord:
        """Raises VerificationError where `data` is not what `to_bytes` writes."""
        try:
            found = json.loads(data)
            if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
                raise ValueError(f"no record of schema version {SCHEMA_VERSION}")
            name = str(found["name"])
            aliases = _texts(found["aliases"])
            return cls(
                name,
                str(found["description"]),
                _texts(found["tags"]),
                aliases,
                tuple(_version(name, row, aliases) for row in found["versions"]),
                str(found.get("layout", "")),
                _texts(found.get("files", {})),
            )
        except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise VerificationError(f"{uri}: not a registry's record: {error}") from error

    def model(self) -> Model:
        """As registries speak of it."""
        versions = tuple(record.version for record in self.versions)
        return Model(self.name, self.description, self.tags, self.aliases, versions)


def _texts(data: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in data.items()}


def _version(model: str, row: Mapping[str, Any], aliases: Mapping[str, str]) -> VersionRecord:
    name, run = str(row["version"]), row.get("run")
    path = str(row["path"])
    manifests, files = (tuple(map(str, row.get(key, ()))) for key in ("manifests", "files"))
    for named in (*manifests, *files, *([path] if path != "." else [])):
        if not is_plain_path(named):
            raise ValueError(f"{named!r} is not a plain relative path")
    version = Version(
        model=model,
        version=name,
        revision="",
        description=str(row.get("description", "")),
        tags=_texts(row.get("tags", {})),
        aliases=tuple(sorted(alias for alias, target in aliases.items() if target == name)),
        created=str(row.get("created", "")),
        stage=str(row.get("stage", "")),
        origin=Origin.from_json(row["origin"]) if "origin" in row else None,
        run=RunLink(**{key: str(value) for key, value in run.items()}) if run else None,
        metrics=tuple(Metric.from_json(metric) for metric in row.get("metrics", ())),
        params=_texts(row.get("params", {})),
    )
    return VersionRecord(version, path, manifests, files, _texts(row.get("identities", {})))
