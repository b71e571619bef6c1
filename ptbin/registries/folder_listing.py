"""What lies in a directory registry: which file belongs to which version of which model, by the template.

One listing. A folder that cannot be read is a problem of the version that it belongs to, which is then not
taken (part of it may be missing), or else a problem by itself; the rest of the registry is still read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ptbin.errors import StorageError
from ptbin.registries.layouts import ONLY_VERSION, Layout
from ptbin.registries.record import OWN_FILES, RECORD
from ptbin.sources.companions import is_companion
from ptbin.stores import ListedObject, Place, Watch
from ptbin.values.names import is_plain_path


@dataclass(slots=True)
class ListedModel:
    """What a listing found of one model.

    Attributes:
        versions: the files of each.
        unreadable: versions of which a folder cannot be read, with what the store says.
        beside: files of the model and of no version that may go along; `left`: others.
    """

    versions: dict[str, list[ListedObject]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    has_record: bool = False


@dataclass(slots=True)
class RegistryListing:
    """All models by name, and folders that cannot be read and belong to no version."""

    models: dict[str, ListedModel] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def model(self, name: str) -> ListedModel:
        """An empty one where there is no such model."""
        return self.models.get(name) or ListedModel()


class _Unreadable(Watch):
    """Remembers which folders cannot be read; the listing goes on."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def cannot_read(self, path: str, error: StorageError) -> None:
        self.found[path] = str(error)


def list_registry(root: Place, layout: Layout) -> RegistryListing:
    """Read it.

    Raises:
        StorageError: `root` itself cannot be read.
    """
    watch = _Unreadable()
    listing = RegistryListing()
    loose: list[str] = []
    for item in root.iter_objects(watch):
        if item.path.split("/", 1)[0] == "_ptbin":
            continue
        found = layout.split(item.path) if is_plain_path(item.path) else None
        if found is None or not found[2]:
            loose.append(item.path)
            continue
        name, version, _ = found
        model = listing.models.setdefault(name, ListedModel())
        if item.path == f"{layout.home(name)}/{RECORD}":
            loose.append(item.path)
            continue
        model.versions.setdefault(version or ONLY_VERSION, []).append(item)
    for path, text in watch.found.items():
        if path.split("/", 1)[0] == "_ptbin":
            continue
        found = layout.split(f"{path}/") if is_plain_path(path) else None
        if found is None:
            listing.unreadable[path] = text
        else:
            model = listing.models.setdefault(found[0], ListedModel())
            model.unreadable.setdefault(found[1] or ONLY_VERSION, text)
    above = {layout.model_folder(name): name for name in listing.models}
    for path in loose:
        if (owner := _name_above(path, above)) is not None:
            _add_loose(listing.models[owner], path, f"{layout.home(owner)}/{RECORD}")
    return listing


def _add_loose(model: ListedModel, path: str, record: str) -> None:
    """A file below a model's folder that is in no version."""
    if path == record:
        model.has_record = True
    elif path.rpartition("/")[2] in OWN_FILES:
        return
    elif is_plain_path(path) and _goes_along(path):
        model.beside.append(path)
    else:
        model.left.append(path)


def _name_above(path: str, above: Mapping[str | None, str]) -> str | None:
    """The model in whose folder a file lies that is in no version."""
    folder = path.rpartition("/")[0]
    while folder:
        if folder in above:
            return above[folder]
        folder = folder.rpartition("/")[0]
    return None


def _goes_along(path: str) -> bool:
    """Whether a file of a model's own may be copied as it is. Checkpoints belong into versions."""
    name = path.rpartition("/")[2]
    return name.isprintable() and (is_companion(name) or name.endswith(".pbtxt"))  # Triton's configuration
