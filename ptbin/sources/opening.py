"""Opening what a URI means as a checkpoint: one file, or several that are one.

    with open_source("s3://models/run1/checkpoint-100") as reader: ...

The reader is pinned whichever it is; a source of several files is one address space (`stores.joined`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptbin.errors import (
    CorruptArchiveError,
    IncompleteCheckpointError,
    NotFoundInStoreError,
    StorageError,
    UsageError,
)
from ptbin.sources.folders import INDEX_SUFFIX, Group, main_handle
from ptbin.sources.part_names import find_parts, may_be_part, split_place
from ptbin.stores import Identity, ListedObject, ObjectStat, RangeReader, Store, open_store
from ptbin.stores.base import refuse_other_object
from ptbin.stores.joined import JoinedReader, joint_identity

__all__ = ["SourcePlace", "find_source", "open_source", "parse_index"]

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
    """What a URI was found to mean.

    Attributes:
        path: of the file, of the index file, or of the folder.
        parts: the files of a folder checkpoint, paths relative to `folder`; empty for one file.
        folder: path of the folder that holds `parts`, or that a file lies in.
        found: of one file, what its store said of it.
        incomplete: why this is not all of a checkpoint, by its names; empty where they do not say so.
    """

    store: Store
    path: str
    folder: str
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
            raise IncompleteCheckpointError(f"{self.store.uri_of(self.path)}: {self.incomplete}{way_out}")

    def open(self, expected: Identity | None = None) -> RangeReader:
        """A pinned reader; a lone part can be opened, several cannot.

        Raises:
            SourceChangedError: the identity is not `expected`.
            IncompleteCheckpointError: files are missing, or they are parts that ptbin does not put together.
        """
        self.refuse_part(parts=True)
        if not self.parts:
            if self.found is None:
                return self.store.open_reader(self.path, expected=expected)
            if expected is not None:
                refuse_other_object(self.found.uri, self.found.identity, expected)
            return self.store.open_found(self.path, self.found)
        reader = JoinedReader(self.store, self.folder, self.parts, uri=self.store.uri_of(self.path))
        if expected is not None:
            refuse_other_object(reader.uri, reader.identity, expected)
        return reader


def open_source(
    uri: str, storage_options: Mapping[str, Any] | None = None, *, expected: Identity | None = None
) -> RangeReader:
    """The checkpoint at `uri`, opened.

    Raises:
        UsageError: a folder that is no checkpoint.
        NotFoundInStoreError, StorageError: from the store.
    """
    return find_source(uri, storage_options).open(expected)


def find_source(uri: str, storage_options: Mapping[str, Any] | None = None) -> SourcePlace:
    """What `uri` means: a file, an index file with its shards, a folder. Errors as `open_source`."""
    store, path = open_store(uri, storage_options)
    path = path.rstrip("/") or path
    if path.endswith(INDEX_SUFFIX):
        return _indexed(store, path)
    file = _look(store, path)
    if file is not None:
        index = path + INDEX_SUFFIX
        if path.endswith(".bin") and _is_raw(store, path, file, index):
            return _indexed(store, index)
        return SourcePlace(
            store, path, path.rpartition("/")[0], incomplete=_why_part(store, path), found=file
        )
    listed = itertools.islice(store.iter_objects(path), MAX_LISTED)
    direct = [item for item in listed if not split_place(item.path)[0]]
    found = main_handle(direct)
    tracker = next((item.path for item in direct if item.path in _TRACKERS), None)
    if found is None and tracker is not None:
        # the last checkpoint, which is a folder next to this file
        tag = store.read_bytes(f"{path}/{tracker}", limit=4096).decode("utf-8", "replace").strip()
        if tracker == MEGATRON_TRACKER and tag.isdecimal():
            tag = f"iter_{int(tag):07d}"
        if _is_plain_name(tag) and store.is_directory(f"{path}/{tag}"):
            return find_source(f"{uri.rstrip('/')}/{tag}", storage_options)
    if found is None:
        raise UsageError(
            f"{store.uri_of(path)}: a directory that is not one checkpoint by itself; name a file in it"
        )
    if isinstance(found, ListedObject):
        return SourcePlace(store, f"{path}/{found.path}", path)
    if found.kind == "sharded":
        return _indexed(store, f"{path}/{found.handle}")
    why = f"parts of one checkpoint: {found.why}" if found.kind == "parts" else ""
    return SourcePlace(store, path, path, _ordered(found), why)


def _look(store: Store, path: str) -> ObjectStat | None:
    """The file at `path`; None where there is a folder.

    A file that holds nothing and has a folder beside it of the same name only marks that (some writers to
    object stores leave those).

    Raises:
        NotFoundInStoreError: there is neither.
    """
    try:
        found = store.look(path)
    except NotFoundInStoreError:
        if store.is_directory(path):
            return None
        raise
    return found if found.size or not store.is_directory(path) else None


def _why_part(store: Store, path: str) -> str:
    """What a single file is a part of; a listing of its folder, where the name calls for one."""
    folder, name = split_place(path)
    if not may_be_part(name):
        return ""
    try:
        listed = itertools.islice(store.iter_objects(folder), MAX_LISTED)
        names = {item.path for item in listed if not split_place(item.path)[0]} | {name}
    except StorageError:
        names = {name}  # a store that hands out files and lists none
    whys = (parts.why for parts in find_parts(names) if name in parts.members)
    return next((f"one part of a checkpoint: {why}" for why in whys), "")


def _ordered(group: Group) -> tuple[ListedObject, ...]:
    return tuple(sorted(group.members, key=lambda item: item.path))


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name and name.isprintable()


def _is_raw(store: Store, path: str, found: ObjectStat, index: str) -> bool:
    """Whether an index of ours vouches for a file that does not look like a torch file."""
    try:
        with store.open_found(path, found) as reader:
            if reader.read(0, min(4, reader.size)).startswith(_PLAIN_HEADS):
                return False
        return parse_index(store.read_bytes(index, limit=MAX_INDEX_NBYTES), index).get("tensors") is not None
    except (NotFoundInStoreError, CorruptArchiveError):
        return False


def _indexed(store: Store, path: str) -> SourcePlace:
    folder, _, name = path.rpartition("/")
    stat = store.stat(path)
    index = parse_index(store.read_bytes(path, limit=MAX_INDEX_NBYTES), stat.uri)
    parts = [ListedObject(name, stat.uri, stat.size, stat.identity)]
    missing = []
    for shard in sorted(set(index["files"])):
        try:
            found = store.stat(f"{folder}/{shard}")
        except NotFoundInStoreError:
            missing.append(shard)
            continue
        parts.append(ListedObject(shard, found.uri, found.size, found.identity))
    why = ""
    if missing:
        shown = ", ".join(missing[:MAX_SHOWN]) + (
            f" and {len(missing) - MAX_SHOWN} more" if missing[MAX_SHOWN:] else ""
        )
        named = len(set(index["files"]))
        why = f"{len(missing)} of the {named} files that this index names are missing: {shown}; fetch them"
    return SourcePlace(store, path, folder, tuple(parts), why)


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
        raise CorruptArchiveError(f"{uri}: the index is no JSON: {error}") from error
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
        if not _is_plain_name(name):
            raise CorruptArchiveError(f"{uri}: the index names {name!r}, which lies outside its folder")
    return {**index, "files": names}
