"""What lies in a store: checkpoints below SOURCE, manifests and orphans below DEST. Listings are streams.

Which files are candidates is decided by name only, so that listing costs no request per file; whether a
candidate is a checkpoint is decided by its content when it is converted (`Found.certain` says whether the
name alone promised one). Memory: of the folders between the root and the place that the listing has reached,
the files that may be parts of a checkpoint of several files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ptbin.catalog.asked import ask_for_named
from ptbin.catalog.entries import Entries, hidden_part
from ptbin.catalog.globs import is_excluded, matches, split_glob
from ptbin.catalog.jobs import Found
from ptbin.catalog.named import NamedFiles
from ptbin.errors import NotFoundInStoreError, StorageError, VerificationError
from ptbin.manifests.manifest import MANIFEST_SUFFIX, parse_manifest
from ptbin.sources.folders import Group, Grouping, is_folder_part
from ptbin.sources.opening import find_source
from ptbin.sources.output_names import SHARD_NUMBER, split_bases
from ptbin.sources.part_names import split_place
from ptbin.sources.suffixes import CHECKPOINT_SUFFIXES, OTHER_SUFFIXES, suffix_of
from ptbin.stores import ListedObject, Place, Watch, WatchQuietly, Where, is_partial_name, place_of
from ptbin.writing.formats import OUTPUT_SUFFIXES

OWN_FOLDER = "_ptbin"
"""Run records and the index of finished work lie there, below DEST."""


def find_checkpoints(
    source: Where,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    is_other: Callable[[ListedObject], bool] = lambda _: False,
    other: Callable[[ListedObject], object] = lambda _: None,
    entries: Entries | None = None,
    parts: bool = False,
    named: NamedFiles | None = None,
    pattern: str | None = None,
) -> Iterator[Found]:
    """Candidates at or below SOURCE: one file, a directory or prefix, or a glob.

    Args:
        include: globs on the path below SOURCE; where given, they decide alone what is a candidate.
        exclude: globs that take candidates away.
        is_other: says of a file that belongs to no group whether it is handed to `other` and is no candidate.
        parts: each part of a checkpoint that ptbin does not put together is a candidate; else all are one.
        named: where given, only what it names is a candidate, whatever `include` says; a few plain files are
            asked for one by one, without a listing (`ptbin.catalog.asked`).
        entries: asked what becomes of hidden files, links, pipes and folders that cannot be read; left out,
            they are passed over.
        pattern: below a SOURCE that `split_glob` has split already.

    Raises:
        NotFoundInStoreError: SOURCE does not exist.
    """
    top, its_pattern = split_glob(source, partial(place_of, storage_options=storage_options))
    pattern = pattern or its_pattern
    if pattern is None and not top.is_directory():
        one = find_one(top)
        if named is None or named.takes(one.path):
            yield one
        return
    shown = (*include, pattern[1:]) if pattern is not None else tuple(include)
    asked = entries or Entries(shown=shown, exclude=exclude)
    asked.uri_of = lambda name: (top / name).uri
    alone = ask_for_named(top, named.paths) if named is not None and pattern is None else None
    listed = (
        item
        for item in (alone if alone is not None else top.iter_objects(asked))
        if not _is_our_own(item.path) and asked.takes(item.path)
    )
    for found in _grouped(listed, parts=parts):
        if isinstance(found, ListedObject):
            if pattern is None or matches(f"/{found.path}", pattern):
                if is_other(found) and not is_excluded(found.path, exclude):
                    other(found)
                    continue
                if named is not None and not named.takes(found.path):
                    continue
                certain = _is_candidate(found, include if named is None else ("**",), exclude)
                if certain is not None:
                    yield Found(found.path, found.uri, found.size, found.identity, certain)
        elif named is not None and not named.takes(found.handle, *(part.path for part in found.members)):
            continue
        elif _is_wanted(found, pattern, include if named is None else (), exclude):
            uri = (top / found.handle).uri if found.handle else top.uri
            yield Found(found.handle or top.name, uri, found.size, found.identity, True)


def _grouped(items: Iterable[ListedObject], *, parts: bool) -> Iterator[ListedObject | Group]:
    """Files that belong together as one; a folder's are decided once the listing has left it.

    Relies on what all listings promise: whatever lies below one folder comes without anything between.
    """
    open_folders: list[tuple[str, Grouping]] = []

    def close() -> Iterator[ListedObject | Group]:
        groups, single = open_folders.pop()[1].finish()
        yield from single
        yield from groups

    for item in items:
        while open_folders and not item.path.startswith(open_folders[-1][0]):
            yield from close()
        folder, name = split_place(item.path)
        if not is_folder_part(name):
            yield item
            continue
        prefix = f"{folder}/" if folder else ""
        grouping = next((found for place, found in reversed(open_folders) if place == prefix), None)
        if grouping is None:
            grouping = Grouping(parts=parts)
            open_folders.append((prefix, grouping))
        grouping.add(item)
    while open_folders:
        yield from close()


def _is_wanted(group: Group, pattern: str | None, include: Sequence[str], exclude: Sequence[str]) -> bool:
    paths = [group.handle, *(member.path for member in group.members)]
    if pattern is not None and not any(matches(f"/{path}", pattern) for path in paths):
        return False
    if is_excluded(group.handle, exclude):
        return False
    return not include or any(matches(path, glob) for glob in include for path in paths)


def find_one(source: Where, *, storage_options: Mapping[str, Any] | None = None) -> Found:
    """SOURCE as one checkpoint: a file, an index with its shards, or a folder that is one.

    Raises:
        NotFoundInStoreError: nothing is there. UsageError: a folder that is not one checkpoint.
    """
    found = find_source(source, storage_options)
    name = found.place.name
    if not found.parts:
        stat = found.place.stat()
        return Found(name, stat.uri, stat.size, stat.identity, True)
    return Found(name, found.place.uri, found.size, found.identity, True)


def _is_our_own(path: str) -> bool:
    """Whether it is a run record, a manifest or an unfinished output."""
    return is_in_own_folder(path) or is_partial_name(path) or path.endswith(MANIFEST_SUFFIX)


def is_in_own_folder(path: str) -> bool:
    """Whether a path below DEST lies in a `_ptbin` folder, at any depth."""
    return OWN_FOLDER in path and OWN_FOLDER in path.split("/")


def _is_candidate(item: ListedObject, include: Sequence[str], exclude: Sequence[str]) -> bool | None:
    """True: by its name a checkpoint. False: its content must tell. None: passed over."""
    # A slash at the end, of a key that holds something, does not hide it: that is refused by name later.
    name = item.path.rstrip("/").rpartition("/")[2]
    if is_excluded(item.path, exclude):
        return None
    if include:
        return True if any(matches(item.path, glob) for glob in include) else None
    suffix = suffix_of(name)
    if suffix in OTHER_SUFFIXES or ".tfevents." in name:
        return None
    return suffix in CHECKPOINT_SUFFIXES


class DestEntries(Watch):
    """What a listing of DEST cannot read; `lost+found` at its root is not ptbin's."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, StorageError]] = []

    def cannot_read(self, path: str, error: StorageError) -> None:
        """Kept; the listing goes on."""
        if path != "lost+found":
            self.problems.append((path, error))


def find_manifests(
    dest: Where, *, storage_options: Mapping[str, Any] | None = None, watch: Watch | None = None
) -> Iterator[str]:
    """URIs of all manifests at or below DEST (DEST may be one manifest, or one output that has one)."""
    place = place_of(dest, storage_options)
    if not place.is_directory():
        single = place.without(MANIFEST_SUFFIX).beside(MANIFEST_SUFFIX)
        single.stat()
        yield single.uri
        return
    for item in place.iter_objects(watch or WatchQuietly()):
        if item.path.endswith(MANIFEST_SUFFIX) and not is_in_own_folder(item.path):
            yield item.uri


def split_manifest(root: Place, path: str) -> str | None:
    """Path below `root` of the manifest next to a file which `--split` made, if one lists it."""
    name = path.rpartition("/")[2]
    for base in split_bases(path):
        try:
            manifest = parse_manifest((root / (base + MANIFEST_SUFFIX)).read_bytes(), base)
        except (NotFoundInStoreError, VerificationError):
            continue
        if any(output["path"] == name for output in manifest["outputs"]):
            return base + MANIFEST_SUFFIX
    return None


def find_orphans(dest: Where, *, storage_options: Mapping[str, Any] | None = None) -> Iterator[str]:
    """URIs of weights below DEST that no manifest vouches for; shards are vouched for by their output's.

    Hidden files are not looked at, as in SOURCE.
    """
    root = place_of(dest, storage_options)
    if not root.is_directory():
        return
    outputs: dict[str, str] = {}
    manifests: set[str] = set()
    for item in root.iter_objects(WatchQuietly()):
        if is_in_own_folder(item.path):
            continue
        if item.path.endswith(MANIFEST_SUFFIX):
            manifests.add(item.path.removesuffix(MANIFEST_SUFFIX))
        elif item.path.endswith(tuple(OUTPUT_SUFFIXES.values())) and not hidden_part(item.path):
            outputs[item.path] = item.uri
    for name, uri in outputs.items():
        if {name, SHARD_NUMBER.sub("", name)} & manifests:
            continue
        may_be_split = not manifests.isdisjoint(split_bases(name))
        if not may_be_split or split_manifest(root, name) is None:
            yield uri
