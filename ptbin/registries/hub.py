"""Repositories of one owner on a Hugging Face Hub: each is a model, its tags are versions.

Read through the Hub's own fsspec filesystem, written by its own client, a commit for each version: it is all
there or not at all. Other tags and branches that lead to the commit of a version are its aliases. Files of
versions to be wait in a folder on this machine, and are gone from there once the Hub has them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ptbin.errors import (
    AccessDeniedError,
    NotFoundInStoreError,
    PtbinError,
    VerificationError,
)
from ptbin.installed import require
from ptbin.registries.base import Attempts, Name, Registration, Registry, RegistryError, VersionSite
from ptbin.registries.hub_names import MAIN, is_reference, name_at_hub, version_of_commit
from ptbin.registries.record import RECORD, ModelRecord, VersionRecord
from ptbin.registries.values import Model, Version, natural_order
from ptbin.stores import Place, place_of, public_uri

STAGING = "unpublished"
"""Below `home`, a folder for each version that is on its way, by fingerprint."""
_OPTIONS = ("endpoint", "token")


class HubRegistry(Registry):
    """`hf://OWNER`.

    Storage options: `endpoint` and `token` as the Hub's client takes them; `private`, whether new
    repositories are (true by default).
    """

    style = "hf"

    def __init__(self, uri: str, options: Mapping[str, Any] | None = None) -> None:
        self.uri = public_uri(uri).rstrip("/")
        self._owner = self.uri.removeprefix("hf://")
        if not is_reference(self._owner):
            raise self._refuse("hf://OWNER names a user or an organisation")
        self._options = dict(options or {})
        self._access = {name: self._options[name] for name in _OPTIONS if name in self._options}
        self._made: Any = None

    @property
    def _api(self) -> Any:
        if self._made is None:
            require("huggingface_hub", self.uri)
            from huggingface_hub import HfApi

            self._made = HfApi(**self._access)
        return self._made

    @contextmanager
    def _faults(self, doing: str) -> Iterator[None]:
        try:
            yield
        except PtbinError:
            raise
        except Exception as error:
            # An upload that failed comes wrapped in a plain RuntimeError.
            chain = list(_causes(error))
            answers = [getattr(getattr(each, "response", None), "status_code", None) for each in chain]
            status = next((answer for answer in answers if isinstance(answer, int)), 0)
            message = f"{self.uri}: cannot {doing}: {public_uri(' '.join(str(error).split())[:300])}"
            if status == 404:
                raise NotFoundInStoreError(message) from error
            if status in (401, 403):
                raise AccessDeniedError(message) from error
            transient = status in (408, 429) or status >= 500
            named = {cls.__name__ for each in chain for cls in type(each).__mro__}
            transient = transient or bool(
                named & {"ConnectError", "TimeoutException", "NetworkError", "RemoteProtocolError"}
            )
            raise RegistryError(message, transient=transient) from error

    # -- source -------------------------------------------------------------------------------------

    def check_readable(self) -> None:
        with self._faults("list repositories"):
            next(iter(self._api.list_models(author=self._owner, limit=1)), None)

    def models(self, wanted: Callable[[str], bool]) -> list[Model]:
        return list(self._found(filter(wanted, self._names())).values())

    def has_models(self, wanted: Callable[[str], bool]) -> bool:
        return any(map(wanted, self._names()))

    def _names(self) -> list[str]:
        with self._faults("list repositories"):
            return sorted(
                str(info.id).removeprefix(f"{self._owner}/")
                for info in self._api.list_models(author=self._owner)
            )

    def existing(self, names: Iterable[str]) -> dict[str, Model]:
        return self._found(name for name in names if self.name_problem(name) is None)

    def _found(self, names: Iterable[str]) -> dict[str, Model]:
        """Those of which there is a repository."""
        found = {}
        for name in names:
            with contextlib.suppress(NotFoundInStoreError):
                found[name] = self._guarded(name, partial(self._model, name))
        return found

    def _model(self, name: str) -> Model:
        """Raises NotFoundInStoreError where there is no such repository."""
        tags, branches = self._references(name)
        record = self._record(name)
        known = {row.version.version: row.version for row in record.versions} if record is not None else {}
        by_commit: dict[str, list[str]] = {}
        for tag, commit in tags.items():
            by_commit.setdefault(commit, []).append(tag)
        versions = []
        aliases: dict[str, str] = {}
        for commit, names in by_commit.items():
            own = version_of_commit(names, known if record is not None else None)
            if own is None:
                continue
            others = [tag for tag in names if tag != own]
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

        filesystem = HfFileSystem(**self._access, skip_instance_cache=True)
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
            return None  # a file of that name of another program

    def detail(self, version: Version) -> Version:
        return version

    def folder(self, version: Version) -> Place:
        return place_of(f"hf://{version.source}", self._options)

    # -- destination --------------------------------------------------------------------------------

    def check_writable(self) -> None:
        self.check_readable()

    def home(self) -> str:
        return str(Path.cwd() / f"ptbin-hub-{self._owner}")

    def name_problem(self, name: str) -> str | None:
        from huggingface_hub.errors import HFValidationError

        # Documented under "Validators"; its stubs do not say that it is exported.
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(f"{self._owner}/{name}")
        except HFValidationError as error:
            return " ".join(str(error).split())
        return super().name_problem(name)

    def name_versions(self, existing: Model | None, versions: Sequence[Version]) -> list[Name]:
        aliases = existing.aliases if existing is not None else {}
        return [name_at_hub(version.version, aliases) for version in versions]

    def alias_problem(self, alias: str, names: Collection[str]) -> str | None:
        if alias == MAIN:
            return f"{MAIN} is the branch that holds the newest version"
        if not is_reference(alias):
            return "not a valid name for a tag"
        if alias in names:
            return "a version's tag has that name"
        return None

    def place(self, model: Model, version: Version, dest_version: str, fingerprint: str) -> VersionSite:
        del version
        folder = str(self._staging / fingerprint)
        published = place_of(f"hf://{self._owner}/{model.name}@{dest_version}", self._options)
        return VersionSite(place_of(folder), folder, published=published)

    @property
    def _staging(self) -> Path:
        return Path(self.home()) / STAGING

    def abandon(self, place: VersionSite) -> None:
        shutil.rmtree(place.token, ignore_errors=True)

    def tidy(self, fingerprints: Collection[str]) -> None:
        for folder in self._staging.glob("*"):
            if folder.name not in fingerprints:
                shutil.rmtree(folder, ignore_errors=True)

    def register(
        self, model: Model, ready: Sequence[Registration], brought: Mapping[str, str] | None = None
    ) -> list[str]:
        del brought
        repository = f"{self._owner}/{model.name}"
        with self._faults(f"make the repository {model.name}"):
            self._api.create_repo(repository, exist_ok=True, private=bool(self._options.get("private", True)))
        known = self._model(model.name).by_fingerprint()
        attempts = Attempts()
        for new in ready:
            if new.fingerprint not in known:
                commit = self._commit(repository, model, new)
                self._tag(repository, new.dest_version, commit)
            for alias in new.aliases:
                with attempts.one():
                    self._tag(repository, alias, new.dest_version)
            shutil.rmtree(new.token, ignore_errors=True)
        attempts.raise_any()
        return [new.dest_version for new in ready]

    def _commit(self, repository: str, model: Model, new: Registration) -> str:
        """The version's files in the place of those before them, in one commit on the main branch."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        record = self._record(model.name) or ModelRecord(model.name)
        record = record.with_version(VersionRecord(new.recorded, ".", new.manifests)).updated(model)
        record = replace(record, aliases={})  # the tags are
        files = _staged(new)
        added = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
            for name, path in sorted(files.items())
        ]
        added.append(CommitOperationAdd(path_in_repo=RECORD, path_or_fileobj=record.to_bytes()))
        with self._faults(f"commit {new.version.path}"):
            before = set(self._api.list_repo_files(repository, revision=MAIN))
            gone = sorted(before - set(files) - {RECORD, ".gitattributes"})
            # What takes long comes first. From here to its new tag a version that has changed is not there:
            # the record of the commit says that it is the new one, and the old tag would say that it is done.
            self._api.preupload_lfs_files(repository, added, revision=MAIN)
            self._untag(repository, new.dest_version)
            made = self._api.create_commit(
                repository,
                [*added, *(CommitOperationDelete(path_in_repo=name) for name in gone)],
                commit_message=f"{new.version.model} {new.dest_version}, by ptbin",
                commit_description=f"From {new.version.uri}, run {new.run_id}.",
                revision=MAIN,
            )
        return str(made.oid)

    def _tag(self, repository: str, tag: str, revision: str) -> None:
        with self._faults(f"tag {tag}"):
            self._untag(repository, tag)
            self._api.create_tag(repository, tag=tag, revision=revision)

    def _untag(self, repository: str, tag: str) -> None:
        with contextlib.suppress(NotFoundInStoreError), self._faults(f"delete tag {tag}"):
            self._api.delete_tag(repository, tag=tag)

    def _update_record(self, repository: str, model: Model, wanted: Mapping[str, Version]) -> None:
        from huggingface_hub import CommitOperationAdd

        record = self._record(model.name)
        if record is None:
            return
        changed = record.updated(model, wanted)
        if changed.to_bytes() == record.to_bytes():
            return
        with self._faults(f"update {model.name}"):
            self._api.create_commit(
                repository,
                [CommitOperationAdd(path_in_repo=RECORD, path_or_fileobj=changed.to_bytes())],
                commit_message="Metadata, by ptbin",
                revision=MAIN,
            )

    def update(
        self, model: Model, aliases: Mapping[str, str], versions: Iterable[tuple[str, Version]]
    ) -> None:
        repository = f"{self._owner}/{model.name}"
        attempts = Attempts()
        with attempts.one():
            self._update_record(repository, model, dict(versions))
        for alias, version in aliases.items():
            with attempts.one():
                self._tag(repository, alias, version)
        attempts.raise_any()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _staged(new: Registration) -> dict[str, Path]:
    """Path in the repository to path here, of all that belongs to the version.

    The folder may be on another machine, or have been cleared, and an empty commit would be a version too.
    """
    folder = Path(new.token)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    wanted = {*new.manifests, *new.files}
    if missing := sorted(wanted - files.keys()):
        raise RegistryError(
            f"{new.version.path}: {len(missing)} of its {len(wanted)} files are not in {folder}, the first "
            f"is {missing[0]}: run again; workers of a migration to a Hub must share the disk of this one"
        )
    # Without `files`, all that is there; with them, nothing that an earlier attempt may have left.
    return {name: path for name, path in files.items() if not new.files or name in wanted}
