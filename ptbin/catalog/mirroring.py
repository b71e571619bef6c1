"""What of DEST a mirror may delete.

An output belongs to a mirror if it was made of a file below its SOURCE and lies where this mirror would put
it. Whatever else lies in DEST is not the mirror's, even with a manifest of ptbin's next to it: the outputs of
another conversion, a copy that was made by hand, files behind a symbolic link. Costs, for each candidate: a
read of its manifest, and a look at each file that it lists.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptbin.catalog.checks import real_uri
from ptbin.catalog.globs import is_excluded
from ptbin.catalog.planning import relative_output
from ptbin.errors import LimitExceededError, NotFoundInStoreError, VerificationError
from ptbin.manifests.manifest import MANIFEST_SUFFIX, parse_manifest
from ptbin.manifests.provenance import STATEMENT_SUFFIX, dump_statement, statement_of
from ptbin.proof.verification import difference_of
from ptbin.sources.output_names import is_named_after
from ptbin.stores import Identity, Place, identity_text

if TYPE_CHECKING:
    from ptbin.catalog.worklist import WorkList

# -- what SOURCE no longer has -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gone:
    """An output or a copy of this mirror that this run would not make.

    Attributes:
        output: its path below DEST.
        files: all that belongs to it, paths below DEST, the manifest first.
        kept: why none of it may be deleted; empty where all of it may.
    """

    output: str
    files: tuple[str, ...]
    kept: str = ""


def iter_gone(
    work: WorkList,
    source: Place,
    *,
    exclude: Sequence[str] = (),
    tick: Callable[[], object] = lambda: None,
) -> Iterator[Gone]:
    """What earlier runs made of SOURCE and the planned one would not. What is excluded is passed over.

    Raises:
        StorageError: DEST could not be read.
    """
    mirror = _Mirror(work, source, exclude)
    for path in work.iter_unexplained():
        tick()
        found = mirror.examine(path)
        if found is not None:
            yield found


def is_reached_plainly(root: Place, path: str) -> bool:
    """Whether `path` below `root` is what its name says: no symbolic link, and none on the way to it."""
    if not root.is_local:
        return True
    place = os.path.join(os.path.realpath(root.path), path)
    return os.path.realpath(place) == place


class _Mirror:
    """One SOURCE and its DEST, and what in the one comes from the other."""

    def __init__(self, work: WorkList, source: Place, exclude: Sequence[str]) -> None:
        self._work = work
        self._rule = work.rule
        self._exclude = exclude
        self._root = real_uri(source)
        self._is_local = source.is_local
        self._roots: dict[str, bool] = {}
        self._dest = work.dest

    def examine(self, path: str) -> Gone | None:
        """What is to be said of a manifest or a copy at `path` below DEST; None: it is not this mirror's."""
        if self._work.is_planned(path):
            return None  # by a name that differs in case: DEST may not tell the two apart
        if path.endswith(MANIFEST_SUFFIX):
            return self._examine_output(path)
        rows = self._work.rows_of(path)
        names = [self._name_of(row.source, lambda name: self._is_copy_at(name, path)) for row in rows]
        if None in names or any(self._is_excluded(name or "", path) for name in names):
            return None
        if not is_reached_plainly(self._dest, path):
            return Gone(path, (path,), f"{path} lies behind a symbolic link")
        try:
            if identity_text((self._dest / path).stat().identity) != rows[0].identity:
                return Gone(path, (path,), f"{path} has changed since it was copied")
        except NotFoundInStoreError:
            return None
        return Gone(path, (path,))

    def _examine_output(self, path: str) -> Gone | None:
        output = path.removesuffix(MANIFEST_SUFFIX)
        for row in self._work.rows_of(path):
            if row.source and self._source_of(row.source, output) is None:
                return None  # without a read: a run on another SOURCE made it
        try:
            data, made = (self._dest / path).read_identified()
            manifest = parse_manifest(data, (self._dest / path).uri)
        except (NotFoundInStoreError, VerificationError, LimitExceededError):
            return None  # not one of ours
        name = self._source_of(str(manifest["source"].get("uri", "")), output)
        if name is None or self._is_excluded(name, output):
            return None
        files, kept = self._files_of(output, manifest, made)
        return Gone(output, (path, *files), kept)

    # -- whose it is -----------------------------------------------------------------------------

    def _source_of(self, uri: str, output: str) -> str | None:
        rule = self._rule
        return self._name_of(
            uri, lambda name: relative_output(name, rule.naming, rule.suffix, rule.layout) == output
        )

    def _is_copy_at(self, name: str, path: str) -> bool:
        return path in (name, self._rule.beside_weights(name, path))

    def _name_of(self, uri: str, fits: Callable[[str], bool]) -> str | None:
        """What `uri` is called below SOURCE, if it lies there, by whatever name SOURCE then had, and fits."""
        if self._is_local:
            uri = uri.removeprefix("file://")
            if not uri.startswith("/"):
                return None
        uri = uri.rstrip("/")
        cut = uri.rfind("/")
        while cut >= 0:
            if fits(uri[cut + 1 :]) and self._is_root(uri[:cut]):
                return uri[cut + 1 :]
            cut = uri.rfind("/", 0, cut)
        # A folder that is one checkpoint, and SOURCE itself, is called by its own name (`find_checkpoints`).
        name = uri.rpartition("/")[2]
        return name if fits(name) and self._is_root(uri) else None

    def _is_root(self, place: str) -> bool:
        if place not in self._roots:
            real = os.path.realpath(place or "/").rstrip("/") if self._is_local else place.rstrip("/")
            self._roots[place] = real == self._root
        return self._roots[place]

    def _is_excluded(self, *paths: str) -> bool:
        return any(is_excluded(path, self._exclude) or self._work.entries.hides(path) for path in paths)

    # -- whether it is what was made -------------------------------------------------------------

    def _files_of(
        self, output: str, manifest: Mapping[str, Any], made: Identity
    ) -> tuple[tuple[str, ...], str]:
        """The files of an output that are there and that this run would not write; why it has to stay."""
        folder, slash, base = output.rpartition("/")
        files = []
        kept = ""
        if not is_reached_plainly(self._dest, output + MANIFEST_SUFFIX):
            kept = f"{output} lies behind a symbolic link"
        for listed in manifest["outputs"]:
            name = listed["path"]
            path = f"{folder}{slash}{name}"
            if self._work.is_planned(path):
                continue
            if not is_named_after(name, base):
                return (), f"its manifest lists {name}, which is not named after it"
            try:
                kept = kept or self._difference(path, listed, made, manifest["tensors"])
            except NotFoundInStoreError:
                continue
            files.append(path)
        if "provenance" in manifest and self._is_statement(output + STATEMENT_SUFFIX, manifest):
            files.append(output + STATEMENT_SUFFIX)
        return tuple(files), kept

    def _difference(
        self,
        path: str,
        listed: Mapping[str, Any],
        made: Identity,
        tensors: Iterable[Mapping[str, Any]],
    ) -> str:
        """Why the file at `path` is not the one that the manifest lists; empty where it is."""
        if not is_reached_plainly(self._dest, path):
            return f"{path} lies behind a symbolic link"
        stat = (self._dest / path).stat()
        if stat.size != listed["size"]:
            return f"{path} is {stat.size} bytes long and no longer {listed['size']}: it is not what was made"
        # Manifests are written last. A file that is younger than its own has been touched or replaced since.
        if _is_younger(stat.identity, made) and self._is_changed(path, listed, tensors):
            return f"{path} was written after its manifest, with other content: it is not what was made"
        return ""

    def _is_changed(self, path: str, listed: Mapping[str, Any], tensors: Iterable[Mapping[str, Any]]) -> bool:
        if all(listed.get(digest) is None for digest in ("sha256", "crc32")):
            return True
        rows = [row for row in tensors if row.get("file") == listed["path"]]
        try:
            with (self._dest / path).open_reader() as reader:
                return difference_of(reader, listed, rows) != ""
        except VerificationError:  # its rows are not internally consistent
            return True

    def _is_statement(self, path: str, manifest: Mapping[str, Any]) -> bool:
        """A statement is made of the manifest alone, so one look tells whether it is this output's."""
        try:
            expected = dump_statement(statement_of(manifest))
            return (self._dest / path).read_bytes() == expected
        except (NotFoundInStoreError, LimitExceededError, LookupError, TypeError):
            return False


def _is_younger(one: Identity, other: Identity) -> bool:
    """By modification times, where the store tells things apart by these (`<nanoseconds>-<size>`)."""
    if one.kind != "mtime" or other.kind != "mtime":
        return False
    first, second = (identity.value.partition("-")[0] for identity in (one, other))
    return first.isdecimal() and second.isdecimal() and int(first) > int(second)
