"""Repositories of one owner on a Hugging Face Hub: each is a model, its tags are versions.

Read through the Hub's own fsspec filesystem, written by its own client, a commit for each version: it is all
there or not at all. Other tags and branches that lead to the commit of a version are its aliases. Files of
versions to be wait in a folder on this machine.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptbin.errors import AccessDeniedError, NotFoundInStoreError, PtbinError, UsageError, VerificationError
from ptbin.registries.base import Folder, Place, Registration, Registry, RegistryError
from ptbin.registries.record import RECORD, ModelRecord, VersionRecord
from ptbin.registries.values import Model, Origin, Version, natural_order
from ptbin.stores import public_uri

__all__ = ["HubRegistry"]

MAIN = "main"
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What is a tag of git everywhere (git-check-ref-format(1)) and a revision in the Hub's URLs."""
_OPTIONS = ("endpoint", "token")


class HubRegistry(Registry):
    """`hf://OWNER`.

    Storage options: `endpoint` and `token` as the Hub's client takes them; `private`, whether new
    repositories are (true unless said otherwise).
    """

    style = "hf"

    def __init__(self, uri: str, options: Mapping[str, Any] | None = None) -> None:
        self.uri = public_uri(uri).rstrip("/")
        self._owner = self.uri.removeprefix("hf://")
        if not _REFERENCE.fullmatch(self._owner):
            raise self._refuse("hf://OWNER names a user or an organisation")
        self._options = dict(options or {})
        self._made: Any = None

    @property
    def _api(self) -> Any:
        if self._made is None:
            try:
                from huggingface_hub import HfApi
            except ImportError as error:
                raise UsageError(
                    f"{self.uri}: the Hub's client is not installed: pip install 'ptbin[hub]'"
                ) from error
            self._made = HfApi(**{name: self._options[name] for name in _OPTIONS if name in self._options})
        return self._made

    @contextmanager
    def _faults(self, doing: str) -> Iterator[None]:
        try:
            yield
        except PtbinError:
            raise
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            message = f"{self.uri}: cannot {doing}: {public_uri(' '.join(str(error).split())[:300])}"
            if status == 404:
                raise NotFoundInStoreError(message) from error
            if status in (401, 403):
                raise AccessDeniedError(message) from error
            transient = status in (408, 429) or (isinstance(status, int) and status >= 500)
            named = {cls.__name__ for cls in type(error).__mro__}
            transient = transient or bool(named & {"ConnectError", "TimeoutException", "NetworkError"})
            raise RegistryError(message, transient=transient) from error

    # -- source -------------------------------------------------------------------------------------

    def check_readable(self) -> None:
        with self._faults("list repositories"):
            next(iter(self._api.list_models(author=self._owner, limit=1)), None)

    def models(self, wanted: Callable[[str], bool]) -> list[Model]:
        with self._faults("list repositories"):
            names = sorted(
                str(info.id).removeprefix(f"{self._owner}/")
                for info in self._api.list_models(author=self._owner)
            )
        found = [self._model(name) for name in names if wanted(name)]
        return [model for model in found if model is not None]

    def existing(self, names: Iterable[str]) -> dict[str, Model]:
        found = {name: self._model(name) for name in names if self.name_problem(name) is None}
        return {name: model for name, model in found.items() if model is not None}

    def _model(self, name: str) -> Model | None:
        """None where there is no such repository."""
        try:
            tags, branches = self._references(name)
        except NotFoundInStoreError:
            return None
        record = self._record(name)
        known = {row.version.version: row.version for row in record.versions} if record is not None else {}
        by_commit: dict[str, list[str]] = {}
        for tag, commit in tags.items():
            by_commit.setdefault(commit, []).append(tag)
        versions = []
        aliases: dict[str, str] = {}
        for commit, names in by_commit.items():
            ordered = sorted(names, key=natural_order)
            own = next((tag for tag in ordered if tag in known), None if record is not None else ordered[0])
            if own is None:
                continue
            others = [tag for tag in ordered if tag != own]
            others += [branch for branch, head in branches.items() if head == commit and branch != MAIN]
            aliases |= dict.fromkeys(others, own)
            versions.append(self._version(name, own, commit, tuple(sorted(others)), known.get(own)))
        head = branches.get(MAIN)
        if record is None and head is not None and head not in by_commit:
            versions.append(self._version(name, MAIN, head, (), None))
        # What is on the main branch and has no tag is the newest.
        versions.sort(key=lambda version: (version.version == MAIN, natural_order(version.version)))
        if record is None:
            return Model(name, aliases=aliases, versions=tuple(versions))
        return Model(name, record.description, record.tags, aliases, tuple(versions))

    def _version(
        self, name: str, version: str, commit: str, aliases: tuple[str, ...], known: Version | None
    ) -> Version:
        base = known or Version(name, version, "")
        return replace(
            base,
            revision=commit,
            source=f"{self._owner}/{name}@{commit}",
            uri=f"hf://{self._owner}/{name}@{version}",
            aliases=aliases,
        )

    def _references(self, name: str) -> tuple[dict[str, str], dict[str, str]]:
        """Tags and branches, each to the commit it leads to."""
        with self._faults(f"read {name}"):
            found = self._api.list_repo_refs(f"{self._owner}/{name}")
        return (
            {str(tag.name): str(tag.target_commit) for tag in found.tags},
            {str(branch.name): str(branch.target_commit) for branch in found.branches},
        )

    def _record(self, name: str) -> ModelRecord | None:
        """What an earlier migration left on the main branch."""
        from huggingface_hub import HfFileSystem

        filesystem = HfFileSystem(
            **{key: self._options[key] for key in _OPTIONS if key in self._options}, skip_instance_cache=True
        )
        path = f"{self._owner}/{name}@{MAIN}/{RECORD}"
        try:
            with self._faults(f"read {RECORD} of {name}"):
                try:
                    data = filesystem.cat_file(path)
                except FileNotFoundError:
                    return None
        except NotFoundInStoreError:
            return None
        try:
            return ModelRecord.from_bytes(data, f"hf://{path}")
        except VerificationError:
            return None  # a file of that name that is somebody else's

    def detail(self, version: Version) -> Version:
        return version

    def folder(self, version: Version) -> Folder:
        return Folder(f"hf://{version.source}")

    # -- destination --------------------------------------------------------------------------------

    def check_writable(self) -> None:
        self.check_readable()

    def home(self) -> str:
        return str(Path.cwd() / f"ptbin-hub-{self._owner}")

    def name_problem(self, name: str) -> str | None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        try:
            validate_repo_id(f"{self._owner}/{name}")
        except HFValidationError as error:
            return " ".join(str(error).split())
        return super().name_problem(name)

    def name_versions(self, existing: Model | None, versions: Sequence[Version]) -> list[str]:
        del existing  # a tag is moved where its version has changed
        for version in versions:
            if not _REFERENCE.fullmatch(version.version):
                raise self._refuse(f"version {version.version!r} of {version.model} cannot be a tag")
        return [version.version for version in versions]

    def not_kept(self, version: Version) -> list[str]:
        return [
            f"alias {alias}: no name of a tag" for alias in version.aliases if not _REFERENCE.fullmatch(alias)
        ]

    def place(self, model: Model, version: Version, dest_version: str, fingerprint: str) -> Place:
        del model, fingerprint
        folder = Path(self.home()) / version.model / dest_version
        return Place(Folder(str(folder)), str(folder))

    def abandon(self, place: Place) -> None:
        shutil.rmtree(place.token, ignore_errors=True)

    def register(self, model: Model, ready: Sequence[Registration]) -> list[str]:
        repository = f"{self._owner}/{model.name}"
        with self._faults(f"make the repository {model.name}"):
            self._api.create_repo(repository, exist_ok=True, private=bool(self._options.get("private", True)))
        there = self._model(model.name)
        known = there.by_fingerprint() if there is not None else {}
        for new in ready:
            if new.fingerprint not in known:
                commit = self._commit(repository, model, new)
                self._tag(repository, new.dest_version, commit)
            for alias in new.aliases:
                if _REFERENCE.fullmatch(alias):
                    self._tag(repository, alias, new.dest_version)
            shutil.rmtree(new.token, ignore_errors=True)
        return [new.dest_version for new in ready]

    def _commit(self, repository: str, model: Model, new: Registration) -> str:
        """The version's files in the place of those before them, in one commit on the main branch."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        record = self._record(model.name) or ModelRecord(model.name)
        version = replace(
            new.version,
            version=new.dest_version,
            aliases=(),
            origin=Origin(new.source_uri, new.version.model, new.version.version, new.fingerprint),
        )
        record = replace(
            record.with_version(VersionRecord(version, ".", new.manifests)),
            description=model.description or record.description,
            tags={**record.tags, **model.tags},
            aliases={},  # the tags are
        )
        folder = Path(new.token)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        with self._faults(f"commit {new.version.path}"):
            before = set(self._api.list_repo_files(repository, revision=MAIN))
            operations: list[Any] = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
                for name, path in sorted(files.items())
            ]
            operations.append(CommitOperationAdd(path_in_repo=RECORD, path_or_fileobj=record.to_bytes()))
            operations += [
                CommitOperationDelete(path_in_repo=name)
                for name in sorted(before - set(files) - {RECORD, ".gitattributes"})
            ]
            made = self._api.create_commit(
                repository,
                operations,
                commit_message=f"{new.version.model} {new.dest_version}, by ptbin",
                commit_description=f"From {new.version.uri}, run {new.run_id}.",
                revision=MAIN,
            )
        return str(made.oid)

    def _tag(self, repository: str, tag: str, revision: str) -> None:
        with self._faults(f"tag {tag}"):
            with contextlib.suppress(NotFoundInStoreError), self._faults(f"delete tag {tag}"):
                self._api.delete_tag(repository, tag=tag)
            self._api.create_tag(repository, tag=tag, revision=revision)

    def update(
        self, model: Model, aliases: Mapping[str, str], versions: Iterable[tuple[str, Version]]
    ) -> None:
        from huggingface_hub import CommitOperationAdd

        repository = f"{self._owner}/{model.name}"
        record = self._record(model.name)
        if record is not None:
            wanted = dict(versions)
            changed = replace(
                record,
                description=model.description or record.description,
                tags={**record.tags, **model.tags},
                versions=tuple(row.updated(wanted.get(row.version.version)) for row in record.versions),
            )
            if changed.to_bytes() != record.to_bytes():
                with self._faults(f"update {model.name}"):
                    self._api.create_commit(
                        repository,
                        [CommitOperationAdd(path_in_repo=RECORD, path_or_fileobj=changed.to_bytes())],
                        commit_message="Metadata, by ptbin",
                        revision=MAIN,
                    )
        for alias, version in aliases.items():
            if _REFERENCE.fullmatch(alias):
                self._tag(repository, alias, version)
