"""The interface of a registry, as a source and as a destination, and nothing else.

A version is registered in two steps, so that none is ever half done: `place` says where its files go, they
are written and proven there, and only `register` makes the version one that consumers find.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ptbin.errors import NotFoundInStoreError, PtbinError, StorageError, UsageError
from ptbin.registries.layouts import Style
from ptbin.registries.values import Model, Origin, Version
from ptbin.stores import Place
from ptbin.values.names import is_plain_name

Pair = tuple[str, str]
"""URI of a file that belongs to a model and to no version, and its path below the model's folder."""


class RegistryError(StorageError):
    """A registry did not do what was asked."""

    reason = "registry_error"


class Attempts:
    """Several things that one call does, each tried although others fail, and one error in the end."""

    def __init__(self) -> None:
        self._errors: list[PtbinError] = []

    @contextmanager
    def one(self) -> Iterator[None]:
        try:
            yield
        except PtbinError as error:
            self._errors.append(error)

    def raise_any(self) -> None:
        """Raises what went wrong, transient where trying again may mend some of it."""
        if not self._errors:
            return
        first, *others = self._errors
        if not others:
            raise first
        transient = any(isinstance(error, StorageError) and error.transient for error in self._errors)
        raise RegistryError("; ".join(str(error) for error in self._errors), transient=transient) from first


@dataclass(frozen=True, slots=True)
class Name:
    """What a version would be called in a destination, or the `problem` that keeps it out."""

    text: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class VersionSite:
    """Where the files of a version to be go.

    Attributes:
        token: what the registry calls that place.
        current: the folder of the state that is registered now and that registering will replace; files
            there that need not change may stay there.
        published: where the files will be, if registering sends them elsewhere.
    """

    folder: Place
    token: str = ""
    current: Place | None = None
    published: Place | None = None

    @property
    def final(self) -> Place:
        """Where the files lie once the version is registered."""
        return self.published or self.current or self.folder


@dataclass(frozen=True, slots=True)
class Registration:
    """A version whose files are there and proven, to be registered.

    Attributes:
        dest_version: what it is expected to be called there.
        manifests: paths below the place.
        files: paths below the place of all that belongs to the version, manifests included.
        aliases: those that are to point to it.
    """

    version: Version
    dest_version: str
    fingerprint: str
    token: str
    manifests: tuple[str, ...]
    aliases: tuple[str, ...]
    source_uri: str
    run_id: str
    files: tuple[str, ...] = ()

    @property
    def recorded(self) -> Version:
        """The version as a record there has it: by its name there, and with its origin."""
        origin = Origin(self.source_uri, self.version.model, self.version.version, self.fingerprint)
        return replace(self.version, version=self.dest_version, origin=origin)


class Registry(ABC):
    """A model registry at a URI. Every error it raises is one of `ptbin.errors`."""

    uri: str
    style: Style = "mirror"
    """How files of a version are called there."""
    folds_case: bool = False
    """Whether two models whose names differ in case alone may be one there."""

    # -- as a source, and to see what a destination has ---------------------------------------------

    @abstractmethod
    def check_readable(self) -> None:
        """Find out early whether models could be listed. May raise."""

    @abstractmethod
    def models(self, wanted: Callable[[str], bool]) -> list[Model]:
        """The models whose names are wanted, with all their versions, in order of names.

        What is wrong with one of them alone is its `problem`, and raises nothing.
        """

    def has_models(self, wanted: Callable[[str], bool]) -> bool:
        """Whether `models` would find any, at a lower price where there is one."""
        return bool(self.models(wanted))

    @abstractmethod
    def existing(self, names: Iterable[str]) -> dict[str, Model]:
        """Of these models those that are registered here, with what migrations need to know of them."""

    @abstractmethod
    def detail(self, version: Version) -> Version:
        """The same version with run, metrics and parameters."""

    @abstractmethod
    def folder(self, version: Version) -> Place:
        """Where the version's files lie."""

    def loose_files(self, model: str) -> tuple[tuple[Pair, ...], list[str]]:
        """Files in a model's folder and in no version: those that go along, and paths of those that stay.

        Triton's `config.pbtxt`, say, goes along; checkpoints and strange paths stay behind.
        """
        del model
        return (), []

    # -- as a destination ---------------------------------------------------------------------------

    @abstractmethod
    def check_writable(self) -> None:
        """Find out early whether versions could be registered; leaves nothing behind. May raise."""

    @abstractmethod
    def home(self) -> str:
        """Storage URI below which leases and run records lie; made where it is not there yet."""

    @abstractmethod
    def name_versions(self, existing: Model | None, versions: Sequence[Version]) -> list[Name]:
        """What each of the new versions would be called there; one that cannot be kept has a problem."""

    def alias_problem(self, alias: str, names: Collection[str]) -> str | None:
        """Why that alias cannot be kept there; None: it can.

        Args:
            names: of the versions that the model has there, and of those that it is to have.
        """
        del alias, names
        return None

    def not_kept(self, version: Version) -> list[str]:
        """What of this version cannot be kept there, but for its name."""
        del version
        return []

    def never_kept(self) -> list[str]:
        """What of no version can be kept there."""
        return []

    def model_folder(self, model: str) -> Place | None:
        """Where files go that belong to the model and to no version; None: into each version."""
        del model
        return None

    @abstractmethod
    def place(self, model: Model, version: Version, dest_version: str, fingerprint: str) -> VersionSite:
        """Where the files of that version go, once `check_place` has passed; the same again after a kill.

        Nothing that is registered is touched before `register`.
        """

    def check_place(self, model: Model, version: Version, dest_version: str) -> None:
        """Find out whether files are in the way of `place` that no migration brought. Writes nothing.

        Raises:
            OutputExistsError: it would.
        """
        del model, version, dest_version

    @abstractmethod
    def abandon(self, place: VersionSite) -> None:
        """Give the place up: the version is not to be."""

    def tidy(self, fingerprints: Collection[str]) -> None:
        """Remove what earlier runs began, were killed over, and none of these fingerprints takes up."""
        del fingerprints

    @abstractmethod
    def register(
        self, model: Model, ready: Sequence[Registration], brought: Mapping[str, str] | None = None
    ) -> list[str]:
        """Register versions of one model, in order; the names that they have now. It may be done again.

        `brought`: files of the model's own that came along: what each is now, by path, as `identity_text` has
        it. Only a registry with a `model_folder` gets any, and keeps them.
        """

    @abstractmethod
    def update(
        self, model: Model, aliases: Mapping[str, str], versions: Iterable[tuple[str, Version]]
    ) -> None:
        """Bring metadata of what is registered in step.

        Args:
            model: name, and the description and tags it is to have.
            aliases: alias to version there, of those that are to be set.
            versions: (version there, the source's) whose description and tags are to be set.
        """

    def known_files(self, model: str) -> Mapping[str, str]:
        """Files of the model's own that migrations brought, as `register` keeps them."""
        del model
        return {}

    def name_problem(self, name: str) -> str | None:
        """Why a model of that name cannot be kept there; None: it can."""
        if not (is_plain_name(name) and name.isprintable()):
            return f"{name!r} is not a plain name: it would become a folder"
        return None

    def _guarded(self, name: str, read: Callable[[], Model]) -> Model:
        """An error of this model alone becomes its problem; that of a registry that is gone is raised."""
        try:
            return read()
        except NotFoundInStoreError:
            raise
        except PtbinError as error:
            if isinstance(error, StorageError) and error.transient:
                raise
            return Model(name, problem=str(error))

    def _refuse(self, what: str) -> UsageError:
        return UsageError(f"{self.uri}: {what}")
