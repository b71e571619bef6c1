"""Directory registries in any store: `<name>/<version>/...` by a template, and `registry.json` per model.

A directory that no migration wrote is read as it lies. Where a model has a `registry.json`, only the versions
that it lists count. A version that has changed at its source is written apart from the registered one, below
`_ptbin/staging/`, and takes its place when it is registered; meanwhile the record does not list it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ptbin.errors import NotFoundInStoreError, OutputExistsError, VerificationError
from ptbin.manifests.manifest import MANIFEST_SUFFIX
from ptbin.registries.base import Name, Pair, Registration, Registry, RegistryError, VersionSite
from ptbin.registries.folder_listing import ListedModel, RegistryListing, list_registry
from ptbin.registries.layouts import ONLY_VERSION, Layout
from ptbin.registries.record import CLAIM, OWN_FILES, RECORD, ModelRecord, VersionRecord
from ptbin.registries.values import Model, Origin, Version, natural_order
from ptbin.stores import ListedObject, Place, identity_text, place_of, public_uri
from ptbin.stores.copying import copy_file, same_content

MAX_RECORD_NBYTES = 64 << 20
STAGING = "_ptbin/staging"
"""Below it a folder for each version that is to take the place of its earlier state, by its fingerprint."""
NO_ORIGIN = Origin("", "", "", "")


class FolderRegistry(Registry):
    """A registry that is a folder or prefix of any store."""

    def __init__(self, uri: str, layout: Layout, options: Mapping[str, Any] | None = None) -> None:
        self.layout = layout
        self.style = layout.style
        self._root = place_of(uri, options).file
        self.folds_case = self._root.is_local
        # However it was spelled: by it versions of this registry differ from those of another.
        self.uri = public_uri(self._root.uri)
        self._listed: RegistryListing | None = None

    # -- source -------------------------------------------------------------------------------------

    def check_readable(self) -> None:
        if not self._root.is_directory():
            raise self._refuse("no such directory or prefix")

    def models(self, wanted: Callable[[str], bool]) -> list[Model]:
        listed = self._list()
        found = [
            self._model(name, model)
            for name, model in listed.models.items()
            if model.versions or model.unreadable or model.has_record
        ]
        found += [Model(path, problem=text) for path, text in listed.unreadable.items()]
        return sorted(
            (model for model in found if wanted(model.name)), key=lambda model: natural_order(model.name)
        )

    def _list(self) -> RegistryListing:
        if self._listed is None:
            self._listed = list_registry(self._root, self.layout)
        return self._listed

    def _model(self, name: str, listed: ListedModel) -> Model:
        try:
            record = self._read_record(name) if listed.has_record else None
        except RegistryError as error:
            found = sorted(listed.versions, key=natural_order)
            return Model(
                name, versions=tuple(Version(name, version, "") for version in found), problem=str(error)
            )
        known = {row.version.version: row.version for row in record.versions} if record is not None else None
        versions = []
        for version in sorted({*listed.versions, *listed.unreadable}, key=natural_order):
            if known is not None and version not in known:
                continue
            there = listed.versions.get(version, [])
            if known is None and any(item.path.endswith(f"/{CLAIM}") for item in there):
                continue  # a migration is at work on it, or was killed
            items = [item for item in there if item.path.rpartition("/")[2] not in OWN_FILES]
            folder = self.layout.folder(name, version)
            base = known[version] if known is not None else Version(name, version, "")
            versions.append(
                replace(
                    base,
                    revision=_revision(items),
                    source=folder,
                    uri=(self._root / folder).uri,
                    problem=listed.unreadable.get(version, ""),
                )
            )
        if record is None:
            return Model(name, versions=tuple(versions))
        return Model(name, record.description, record.tags, record.aliases, tuple(versions))

    def existing(self, names: Iterable[str]) -> dict[str, Model]:
        found = {}
        for name in names:
            try:
                record = self._read_record(name)
            except RegistryError as error:
                found[name] = Model(name, problem=str(error))
                continue
            if record is None:
                continue
            model = record.model()
            if record.layout and record.layout != self.style:
                text = f"there it is laid out as {record.layout}: --layout {record.layout}, or another DEST"
                model = replace(model, problem=text)
            found[name] = model
        return found

    def detail(self, version: Version) -> Version:
        return version

    def folder(self, version: Version) -> Place:
        return self._place_of(version.model, version.version)

    def _place_of(self, model: str, version: str) -> Place:
        return self._root / self.layout.folder(model, version)

    def loose_files(self, model: str) -> tuple[tuple[Pair, ...], list[str]]:
        listed, above = self._list().model(model), self.layout.model_folder(model)
        start = 0 if above is None else len(above) + 1
        beside = () if above is None else listed.beside
        pairs = tuple(((self._root / path).uri, path[start:]) for path in sorted(beside))
        return pairs, [path[start:] for path in sorted(listed.left)]

    # -- destination --------------------------------------------------------------------------------

    def check_writable(self) -> None:
        self._root.check_writable()

    def home(self) -> str:
        return self._root.uri

    def name_problem(self, name: str) -> str | None:
        if name == "_ptbin" or name in OWN_FILES:
            return f"{name!r} is a name of ptbin's own"
        if self.layout.model_folder(name) is None and self.layout.has_versions:
            return f"the layout {self.layout.template!r} gives a model no separate folder, for its {RECORD}"
        return super().name_problem(name)

    def name_versions(self, existing: Model | None, versions: Sequence[Version]) -> list[Name]:
        del existing  # a version that has changed takes the place of its earlier state
        return [self._name(version, alone=len(versions) == 1) for version in versions]

    def _name(self, version: Version, *, alone: bool) -> Name:
        if not self.layout.has_versions:
            if not alone:
                return Name(problem="the layout has room for one version of a model: --versions latest")
            return Name(ONLY_VERSION)
        name = version.version
        if (problem := super().name_problem(name)) is not None:
            return Name(problem=problem)
        if self.layout.style == "triton" and not (name.isascii() and name.isdigit() and name[0] != "0"):
            return Name(problem=f"Triton's versions are numbers, and {version.path} is not one")
        return Name(name)

    def model_folder(self, model: str) -> Place | None:
        return self._root / self.layout.home(model) if self.layout.has_versions else None

    def place(self, model: Model, version: Version, dest_version: str, fingerprint: str) -> VersionSite:
        folder = self._place_of(version.model, dest_version)
        if any(old.version == dest_version for old in model.versions):
            return VersionSite(self._staging(fingerprint), dest_version, folder)
        place = VersionSite(folder, dest_version)
        claim = {"model": version.model, "version": version.version, "fingerprint": fingerprint}
        if not _is_empty(folder):
            if _read_claim(folder) == claim:
                return place
            # What was begun is of another state: none of it may stay next to what comes now.
            _empty(folder)
        (folder / CLAIM).write_bytes(json.dumps(claim).encode())
        return place

    def _staging(self, fingerprint: str) -> Place:
        return self._root / STAGING / fingerprint

    def check_place(self, model: Model, version: Version, dest_version: str) -> None:
        folder = self._place_of(version.model, dest_version)
        if any(old.version == dest_version for old in model.versions) or _is_empty(folder):
            return
        found = _read_claim(folder)
        if (found.get("model"), found.get("version")) != (version.model, version.version):
            raise OutputExistsError(
                f"{folder.uri} holds files that are not of {version.uri}; move them away, "
                "or choose another DEST or --layout"
            )

    def abandon(self, place: VersionSite) -> None:
        """Remove what was written; what is registered is never touched."""
        folder = place.folder
        if place.current is None:
            claim = _read_claim(folder)
            if not claim:
                return
            record = self._read_record(str(claim.get("model")))
            if record is not None and record.row(place.token) is not None:
                return  # a run was killed between registering it and taking the claim away
        _empty(folder)

    def tidy(self, fingerprints: Collection[str]) -> None:
        staging = self._root / STAGING
        for item in list(staging.iter_objects()):
            if item.path.split("/", 1)[0] not in fingerprints:
                (staging / item.path).delete()

    def register(
        self, model: Model, ready: Sequence[Registration], brought: Mapping[str, str] | None = None
    ) -> list[str]:
        record = self._read_record(model.name) or ModelRecord(
            model.name, model.description, model.tags, layout=self.style
        )
        aliases = dict(record.aliases)
        above = self.layout.home(model.name)
        for new in ready:
            folder = self.layout.folder(model.name, new.dest_version)
            old = record.row(new.dest_version)
            if old is not None and (old.version.origin or NO_ORIGIN).fingerprint != new.fingerprint:
                record = record.without_version(new.dest_version)
                self._replace(record, old, new, self._root / folder)
            path = folder[len(above) :].lstrip("/") or "."
            identities = _identities(self._root / folder, new.files)
            record = record.with_version(
                VersionRecord(new.recorded, path, new.manifests, new.files, identities)
            )
            aliases.update(dict.fromkeys(new.aliases, new.dest_version))
        files = {**record.files, **(brought or {})}
        self._write_record(replace(record.updated(model), aliases=aliases, files=files))
        for new in ready:
            (self._place_of(model.name, new.dest_version) / CLAIM).delete()
            _empty(self._staging(new.fingerprint))
        return [new.dest_version for new in ready]

    def _refuse_foreign(self, old: VersionRecord, new: Registration, folder: Place) -> None:
        """Raise OutputExistsError where a file is in the way that no migration put there, or not as it is."""
        staging = self._staging(new.fingerprint)
        staged = {item.path for item in staging.iter_objects()}
        goes = staged | (set(old.files) - set(new.files))
        for item in folder.iter_objects():
            name = item.path
            if name not in goes or name in OWN_FILES:
                continue
            there = identity_text(item.identity) if item.identity is not None else ""
            # A record that states no identity may be anybody's, and list anybody's files.
            if name in old.files and old.identities.get(name, "") == there:
                continue
            if name in staged and same_content(staging / name, folder / name):
                continue
            raise OutputExistsError(
                f"{(folder / name).uri}: a file of {item.size} bytes is there that no migration left so; "
                "move it away, or choose another DEST"
            )

    def _replace(self, record: ModelRecord, old: VersionRecord, new: Registration, folder: Place) -> None:
        """Bring the staged files where those of the version's earlier state are; it is not registered then.

        Killed on the way, the claim tells the next run to do the version anew.
        """
        self._refuse_foreign(old, new, folder)
        claim = {"model": new.version.model, "version": new.version.version}
        (folder / CLAIM).write_bytes(json.dumps(claim).encode())
        self._write_record(record)
        for name in sorted(set(old.files) - set(new.files), key=_manifests_first):
            (folder / name).delete()
        staging = self._staging(new.fingerprint)
        staged = [item.path for item in staging.iter_objects()]
        for name in staged:
            if name.endswith(MANIFEST_SUFFIX):
                (folder / name).delete()
        for name in sorted(staged, key=_manifests_first, reverse=True):
            copy_file(staging / name, folder / name)

    def known_files(self, model: str) -> Mapping[str, str]:
        record = self._read_record(model)
        return {} if record is None else record.files

    def update(
        self, model: Model, aliases: Mapping[str, str], versions: Iterable[tuple[str, Version]]
    ) -> None:
        record = self._read_record(model.name)
        if record is None:
            return
        updated = record.updated(model, dict(versions))
        self._write_record(replace(updated, aliases={**record.aliases, **aliases}))

    # -- registry.json ------------------------------------------------------------------------------

    def _read_record(self, name: str) -> ModelRecord | None:
        place = self._record_place(name)
        try:
            data = place.read_bytes(limit=MAX_RECORD_NBYTES)
        except NotFoundInStoreError:
            return None
        try:
            return ModelRecord.from_bytes(data, place.uri)
        except VerificationError as error:
            raise RegistryError(str(error)) from error

    def _write_record(self, record: ModelRecord) -> None:
        self._record_place(record.name).write_bytes(record.to_bytes())

    def _record_place(self, name: str) -> Place:
        return self._root / self.layout.home(name) / RECORD


def _read_claim(folder: Place) -> dict[str, Any]:
    """Empty where none can be read."""
    try:
        found = json.loads((folder / CLAIM).read_bytes(limit=MAX_RECORD_NBYTES))
    except (NotFoundInStoreError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_empty(folder: Place) -> bool:
    # Without versions a model's own record lies in the same folder.
    return all(item.path == RECORD for item in folder.iter_objects())


def _empty(folder: Place) -> None:
    """Delete what lies there but a record. Manifests first: nothing may look finished meanwhile."""
    found = [item.path for item in folder.iter_objects() if item.path != RECORD]
    for name in sorted(found, key=lambda name: (name == CLAIM, not name.endswith(MANIFEST_SUFFIX), name)):
        (folder / name).delete()


def _identities(folder: Place, files: Sequence[str]) -> dict[str, str]:
    wanted = set(files)
    return {
        item.path: identity_text(item.identity)
        for item in folder.iter_objects()
        if item.path in wanted and item.identity is not None
    }


def _revision(items: Sequence[ListedObject]) -> str:
    """Of the files' names, sizes and identities."""
    rows = sorted(
        [item.path, item.size, item.identity.to_json() if item.identity is not None else None]
        for item in items
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _manifests_first(name: str) -> tuple[bool, str]:
    return (not name.endswith(MANIFEST_SUFFIX), name)
