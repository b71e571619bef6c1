"""Opening what a URI means as a checkpoint: one file, or several that are one.

    with find_source("s3://models/run1/checkpoint-100").open() as reader: ...

The reader is pinned whichever it is; a source of several files is one address space (`stores.joined`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ptbin.errors import (
    CorruptArchiveError,
    IncompleteCheckpointError,
    NotFoundInStoreError,
    StorageError,
    UsageError,
)
from ptbin.sources.folders import main_handle
from ptbin.sources.part_names import INDEX_SUFFIX, find_parts, listed_names, may_be_part, split_place
from ptbin.stores import Identity, ListedObject, ObjectStat, Place, RangeReader, place_of
from ptbin.stores.joined import JoinedReader, joint_identity
from ptbin.values.names import is_plain_name

if TYPE_CHECKING:
    from ptbin.stores.place import Where

# Files directly in a folder that is asked to be one checkpoint; a store with more is not one.
MAX_LISTED = 200_000
MAX_INDEX_NBYTES = 256 << 20
MAX_SHOWN = 20
"""Names of missing files in one message."""
MEGATRON_TRACKER = "latest_checkpointed_iteration.txt"
_TRACKERS = ("latest", MEGATRON_TRACKER)
"""Files that name the last checkpoint: DeepSpeed's its tag, Megatron-LM's its iteration, or `release`."""
_PLAIN_HEADS = (b"PK\x03\x04", b"\x80")


@dataclass(frozen=True, slots=True)
class SourcePlace:
    """What a place was found to mean.

    Attributes:
        place: of the file, of the index file, or of the folder.
        folder: which holds `parts`, or which a file lies in.
        parts: the files of a folder checkpoint, paths relative to `folder`; empty for one file.
        found: of one file, what its store said of it.
        incomplete: why this is not all of a checkpoint, by its names; empty where they do not say so.
    """

    place: Place
    folder: Place
    parts: tuple[ListedObject, ...] = ()
    incomplete: str = ""
    found: ObjectStat | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """Bytes of all parts together."""
        return sum(part.size for part in self.parts)

    @property
    def identity(self) -> Identity:
        """Of all parts together."""
        return joint_identity((part.path, part.size, part.identity) for part in self.parts)

    def refuse_part(self, *, parts: bool = False) -> None:
        """Raise where this is not all of a checkpoint; with `parts` one file of it is taken knowingly.

        Raises:
            IncompleteCheckpointError: the other files, and what to do.
        """
        if self.incomplete and (self.parts or not parts):
            way_out = "" if self.parts else "; --parts takes this one knowingly"
            raise IncompleteCheckpointError(f"{self.place.uri}: {self.incomplete}{way_out}")

    def open(self, expected: Identity | None = None) -> RangeReader:
        """A pinned reader; a lone part can be opened, several cannot.

        Raises:
            SourceChangedError: the identity is not `expected`.
            IncompleteCheckpointError: files are missing, or they are parts that ptbin does not put together.
        """
        self.refuse_part(parts=True)
        if not self.parts:
            if self.found is None:
                return self.place.open_reader(expected=expected)
            return self.place.open_found(self.found).expecting(expected)
        return JoinedReader(self.folder, self.parts, uri=self.place.uri).expecting(expected)


def find_source(where: Where, storage_options: Mapping[str, Any] | None = None) -> SourcePlace:
    """What a place means: a file, an index file with its shards, a folder.

    Raises:
        UsageError: a folder that is no checkpoint.
        NotFoundInStoreError, StorageError: from the store.
    """
    place = place_of(where, storage_options).file
    if place.name.endswith(INDEX_SUFFIX):
        return _indexed(place)
    file = _look(place)
    if file is not None:
        index = place.beside(INDEX_SUFFIX)
        if place.name.endswith(".bin") and _is_raw(place, file, index):
            return _indexed(index)
        return SourcePlace(place, place.parent, incomplete=_why_part(place), found=file)
    direct = _directly_in(place)
    found = main_handle(direct)
    tracker = next((item.path for item in direct if item.path in _TRACKERS), None)
    if found is None and tracker is not None:
        # the last checkpoint, which is a folder next to this file
        tag = (place / tracker).read_bytes(limit=4096).decode("utf-8", "replace").strip()
        if tracker == MEGATRON_TRACKER and tag.isdecimal():
            tag = f"iter_{int(tag):07d}"
        if is_plain_name(tag) and tag.isprintable() and (place / tag).is_directory():
            return find_source(place / tag)
    if found is None:
        raise UsageError(f"{place.uri}: a directory that is not one checkpoint by itself; name a file in it")
    if isinstance(found, ListedObject):
        if found.path.endswith(INDEX_SUFFIX):  # its shards have names of their own
            return _indexed(place / found.path)
        return SourcePlace(place / found.path, place)
    if found.kind == "sharded":
        return _indexed(place / found.handle)
    why = f"parts of one checkpoint: {found.why}" if found.kind == "parts" else ""
    return SourcePlace(place, place, tuple(sorted(found.members, key=lambda item: item.path)), why)


def _look(place: Place) -> ObjectStat | None:
    """The file there; None where there is a folder.

    A file that holds nothing and has a folder beside it of the same name only marks that (some writers to
    object stores leave those).

    Raises:
        NotFoundInStoreError: there is neither.
    """
    try:
        found = place.look()
    except NotFoundInStoreError:
        if place.is_directory():
            return None
        raise
    return found if found.size or not place.is_directory() else None


def _why_part(place: Place) -> str:
    """What a single file is a part of; a listing of its folder, where the name calls for one."""
    name = split_place(place.path)[1]
    if not may_be_part(name):
        return ""
    names = {name}
    with contextlib.suppress(StorageError):  # a store that hands out files and lists none
        names |= {item.path for item in _directly_in(place.without(f"/{name}"))}
    whys = (parts.why for parts in find_parts(names) if name in parts.members)
    return next((f"one part of a checkpoint: {why}" for why in whys), "")


def _directly_in(folder: Place) -> list[ListedObject]:
    listed = itertools.islice(folder.iter_objects(), MAX_LISTED)
    return [item for item in listed if not split_place(item.path)[0]]


def _is_raw(place: Place, found: ObjectStat, index: Place) -> bool:
    """Whether an index of ours vouches for a file that does not look like a torch file."""
    try:
        with place.open_found(found) as reader:
            if reader.read(0, min(4, reader.size)).startswith(_PLAIN_HEADS):
                return False
        return parse_index(index.read_bytes(limit=MAX_INDEX_NBYTES), index.uri).get("tensors") is not None
    except (NotFoundInStoreError, CorruptArchiveError):
        return False


def _indexed(place: Place) -> SourcePlace:
    folder = place.parent
    stat = place.stat()
    index = parse_index(place.read_bytes(limit=MAX_INDEX_NBYTES), stat.uri)
    parts = [ListedObject(place.name, stat.uri, stat.size, stat.identity)]
    missing = []
    for shard in sorted(index["files"]):
        try:
            found = (folder / shard).stat()
            parts.append(ListedObject(shard, found.uri, found.size, found.identity))
        except NotFoundInStoreError:
            missing.append(shard)
    why = ""
    if missing:
        named = f"{len(missing)} of the {len(index['files'])} files that this index names"
        why = f"{named} are missing: {listed_names(missing, MAX_SHOWN)}; fetch them"
    return SourcePlace(place, folder, tuple(parts), why)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def parse_index(data: bytes, uri: str) -> dict[str, Any]:
    """An index of shards, with `files` (names of the files it refers to) added.

    Hugging Face's has `weight_map` (tensor name to file), that of format `raw` has `tensors`.

    Raises:
        CorruptArchiveError: no such index, or a file name that is absolute, climbs, or leads into a folder.
    """
    try:
        index = json.loads(data, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptArchiveError(f"{uri}: the index is not JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    tensors = index.get("tensors") if isinstance(index, dict) else None
    if isinstance(weight_map, dict):
        files = list(weight_map.values())
    elif isinstance(tensors, dict) and all(isinstance(row, dict) for row in tensors.values()):
        files = [row.get("file") for row in tensors.values()]
    else:
        raise CorruptArchiveError(f"{uri}: neither a weight_map nor tensors are in this index")
    names = list(dict.fromkeys(files)) if all(isinstance(name, str) for name in files) else []
    if not names:
        raise CorruptArchiveError(f"{uri}: the index names no files")
    for name in names:
        if not (is_plain_name(name) and name.isprintable()):
            raise CorruptArchiveError(f"{uri}: the index names {name!r}, which lies outside its folder")
    return {**index, "files": names}
