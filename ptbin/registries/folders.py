"""Directory registries in any store: `<name>/<version>/...` by a template, and `registry.json` per model.

A directory that no migration wrote is read as it lies. Where a model has a `registry.json`, only the versions
that it lists count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ptbin.errors import NotFoundInStoreError, OutputCollisionError, VerificationError
from ptbin.manifest import MANIFEST_SUFFIX
from ptbin.registries.base import Folder, Place, Registration, Registry, RegistryError
from ptbin.registries.layouts import Layout
from ptbin.registries.record import CLAIM, OWN_FILES, RECORD, ModelRecord, VersionRecord
from ptbin.registries.values import Model, Origin, Version, natural_order
from ptbin.stores import ListedObject, open_store, public_uri

__all__ = ["ONLY_VERSION", "FolderRegistry"]

ONLY_VERSION = "main"
"""What the one version of a model is called where the template has no place for versions."""
MAX_RECORD_NBYTES = 64 << 20


@dataclass(slots=True)
class _Listed:
    """What a listing found of one model."""

    versions: dict[str, list[ListedObject]] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    has_record: bool = False


class FolderRegistry(Registry):
    """A registry that is a folder or prefix of any store."""

    def __init__(self, uri: str, layout: Layout, options: Mapping[str, Any] | None = None) -> None:
        self.uri = public_uri(uri).rstrip("/") or uri
        self.layout = layout
        self.style = layout.style
        self._options = dict(options or {})
        self._store, root = open_store(uri, self._options)
        self._root = root.rstrip("/")
        self._listed: dict[str, _Listed] | None = None

    # -- source -------------------------------------------------------------------------------------

    def check_readable(self) -> None:
        if not self._store.is_directory(self._root):
            raise self._refuse("no such directory or prefix")

    def models(self, wanted: Callable[[str], bool]) -> list[Model]:
        listed = self._list()
        return [
            self._model(name, listed[name])
            for name in sorted(listed, key=natural_order)
            if wanted(name) and (listed[name].versions or listed[name].has_record)
        ]

    def _list(self) -> dict[str, _Listed]:
        if self._listed is not None:
            return self._listed
        listed: dict[str, _Listed] = {}
        loose: list[str] = []
        for item in self._store.iter_objects(self._root):
            if item.path.split("/", 1)[0] == "_ptbin":
                continue
            found = self.layout.split(item.path)
            if found is None or not found[2]:
                loose.append(item.path)
                continue
            name, version, _ = found
            model = listed.setdefault(name, _Listed())
            if item.path.rpartition("/")[2] in OWN_FILES and item.path == self._record_path(name):
                loose.append(item.path)
                continue
            version = version or ONLY_VERSION
            model.versions.setdefault(version, []).append(item)
        for path in loose:
            for name in self._names_above(path, listed):
                if path == self._record_path(name):
                    listed[name].has_record = True
                elif path.rpartition("/")[2] not in OWN_FILES:
                    listed[name].beside.append(path)
        self._listed = listed
        return listed

    def _names_above(self, path: str, listed: Mapping[str, _Listed]) -> list[str]:
        """The models in whose folder a file lies that is in no version."""
        folders = path.split("/")[:-1]
        return [
            name
            for name in dict.fromkeys(folders)
            if name in listed
            and (above := self.layout.model_folder(name)) is not None
            and path.startswith(f"{above}/")
        ]

    def _model(self, name: str, listed: _Listed) -> Model:
        record = self._read_record(name) if listed.has_record else None
        known = {row.version.version: row.version for row in record.versions} if record is not None else None
        versions = []
        for version in sorted(listed.versions, key=natural_order):
            if known is not None and version not in known:
                continue
            items = [
                item for item in listed.versions[version] if item.path.rpartition("/")[2] not in OWN_FILES
            ]
            folder = self.layout.folder(name, version)
            base = known[version] if known is not None else Version(name, version, "")
            versions.append(
                replace(
                    base,
                    revision=_revision(items),
                    source=folder,
                    uri=self._store.uri_of(f"{self._root}/{folder}"),
                )
            )
        if record is None:
            return Model(name, versions=tuple(versions))
        return Model(name, record.description, record.tags, record.aliases, tuple(versions))

    def existing(self, names: Iterable[str]) -> dict[str, Model]:
        found = {}
        for name in names:
            record = self._read_record(name)
            if record is not None:
                found[name] = record.model()
        return found

    def detail(self, version: Version) -> Version:
        return version

    def folder(self, version: Version) -> Folder:
        return Folder(
            self._store.uri_of(f"{self._root}/{self.layout.folder(version.model, version.version)}")
        )

    def model_files(self, model: str) -> Folder | None:
        above = self.layout.model_folder(model)
        beside = self._list().get(model, _Listed()).beside
        if above is None or not beside:
            return None
        files = tuple(sorted(path[len(above) + 1 :] for path in beside))
        return Folder(self._store.uri_of(f"{self._root}/{above}"), files=files)

    # -- destination --------------------------------------------------------------------------------

    def check_writable(self) -> None:
        self._store.check_writable(self._root)

    def home(self) -> str:
        return self._store.uri_of(self._root)

    def name_problem(self, name: str) -> str | None:
        if name == "_ptbin" or name in OWN_FILES:
            return f"{name!r} is a name of ptbin's own"
        if self.layout.model_folder(name) is None and self.layout.has_versions:
            return f"the layout {self.layout.template!r} gives a model no folder of its own, for its {RECORD}"
        return super().name_problem(name)

    def name_versions(self, existing: Model | None, versions: Sequence[Version]) -> list[str]:
        del existing  # a version that has changed is written over
        names = []
        for version in versions:
            name = version.version if self.layout.has_versions else ONLY_VERSION
            if (problem := super().name_problem(name)) is not None:
                raise self._refuse(problem)
            if self.layout.style == "triton" and not (name.isascii() and name.isdigit() and name[0] != "0"):
                raise self._refuse(f"Triton's versions are numbers, and {version.path} is none")
            names.append(name)
        if len(set(names)) < len(names):
            raise self._refuse("the layout has room for one version of a model: --versions latest")
        return names

    def model_folder(self, model: str) -> Folder | None:
        above = self._above(model)
        return Folder(self._store.uri_of(f"{self._root}/{above}")) if self.layout.has_versions else None

    def place(self, model: Model, version: Version, dest_version: str, fingerprint: str) -> Place:
        del fingerprint  # the folder says it
        folder = self.layout.folder(version.model, dest_version)
        path = f"{self._root}/{folder}"
        place = Place(Folder(self._store.uri_of(path)), dest_version)
        known = next((old for old in model.versions if old.version == dest_version), None)
        if known is not None:
            origin = known.origin
            if origin is None or (origin.model, origin.version) != (version.model, version.version):
                raise OutputCollisionError(
                    f"{place.folder.uri} is registered and does not come from {version.uri}"
                )
            return place
        claim = {"model": version.model, "version": version.version}
        if not self._is_empty(path):
            try:
                found = json.loads(self._store.read_bytes(f"{path}/{CLAIM}", limit=MAX_RECORD_NBYTES))
            except (NotFoundInStoreError, ValueError):
                found = None
            if found != claim:
                raise OutputCollisionError(
                    f"{place.folder.uri} holds files that do not come from {version.uri}"
                )
        else:
            self._store.write_bytes(f"{path}/{CLAIM}", json.dumps(claim).encode())
        return place

    def _is_empty(self, path: str) -> bool:
        # Without versions a model's own record lies in the same folder.
        return all(item.path == RECORD for item in self._store.iter_objects(path))

    def abandon(self, place: Place) -> None:
        """Remove what was written, unless an earlier state of the version is registered there."""
        store, path = open_store(place.folder.uri, self._options)
        try:
            store.stat(f"{path}/{CLAIM}")
        except NotFoundInStoreError:
            return
        found = [item.path for item in store.iter_objects(path)]
        # Manifests first: nothing may look finished meanwhile; the claim last.
        for name in sorted(found, key=lambda name: (name == CLAIM, not name.endswith(MANIFEST_SUFFIX), name)):
            store.delete(f"{path}/{name}")

    def register(self, model: Model, ready: Sequence[Registration]) -> list[str]:
        record = self._read_record(model.name) or ModelRecord(model.name, model.description, model.tags)
        aliases = dict(record.aliases)
        above = self._above(model.name)
        for new in ready:
            version = replace(
                new.version,
                version=new.dest_version,
                origin=Origin(new.source_uri, new.version.model, new.version.version, new.fingerprint),
            )
            path = self.layout.folder(model.name, new.dest_version)[len(above) :].lstrip("/") or "."
            record = record.with_version(VersionRecord(version, path, new.manifests))
            aliases.update(dict.fromkeys(new.aliases, new.dest_version))
        self._write_record(
            replace(record, description=model.description or record.description, aliases=aliases)
        )
        for new in ready:
            self._store.delete(f"{self._root}/{self.layout.folder(model.name, new.dest_version)}/{CLAIM}")
        return [new.dest_version for new in ready]

    def update(
        self, model: Model, aliases: Mapping[str, str], versions: Iterable[tuple[str, Version]]
    ) -> None:
        record = self._read_record(model.name)
        if record is None:
            return
        wanted = dict(versions)
        rows = tuple(row.updated(wanted.get(row.version.version)) for row in record.versions)
        self._write_record(
            replace(
                record,
                description=model.description or record.description,
                tags={**record.tags, **model.tags},
                aliases={**record.aliases, **aliases},
                versions=rows,
            )
        )

    # -- registry.json ------------------------------------------------------------------------------

    def _above(self, name: str) -> str:
        above = self.layout.model_folder(name)
        return above if above is not None else self.layout.folder(name, ONLY_VERSION)

    def _record_path(self, name: str) -> str:
        return f"{self._above(name)}/{RECORD}"

    def _read_record(self, name: str) -> ModelRecord | None:
        path = f"{self._root}/{self._record_path(name)}"
        try:
            data = self._store.read_bytes(path, limit=MAX_RECORD_NBYTES)
        except NotFoundInStoreError:
            return None
        try:
            return ModelRecord.from_bytes(data, self._store.uri_of(path))
        except VerificationError as error:
            raise RegistryError(str(error)) from error

    def _write_record(self, record: ModelRecord) -> None:
        self._store.write_bytes(f"{self._root}/{self._record_path(record.name)}", record.to_bytes())


def _revision(items: Sequence[ListedObject]) -> str:
    """Of the files' names, sizes and identities."""
    rows = sorted(
        [item.path, item.size, item.identity.to_json() if item.identity is not None else None]
        for item in items
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
