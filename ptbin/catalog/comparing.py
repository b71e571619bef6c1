"""What a mirror asks of content: would a conversion change anything, is a file a checkpoint at all.

An output is a pure function of its source's bytes and the options, so it is made once more, into nothing but
a digest, and the digest is held against the manifest. That reads the weights and writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ptbin.catalog.finished import FinishedRow, row_of, row_of_copy
from ptbin.catalog.jobs import Job
from ptbin.conversion import Published
from ptbin.errors import (
    CheckpointError,
    NoStateDictError,
    NotFoundInStoreError,
    UnsupportedFormatError,
    VerificationError,
)
from ptbin.manifests.damage import damaged_file, is_damaged, note_damage
from ptbin.manifests.drafting import stored_of
from ptbin.manifests.manifest import MANIFEST_SUFFIX, dump_manifest, parse_manifest
from ptbin.options import ConvertOptions
from ptbin.preparing import plan_conversion
from ptbin.proof.digests import OnePass, digest_file
from ptbin.proof.verification import difference_of
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.selected import read_selected
from ptbin.sources.opening import SourcePlace, find_source
from ptbin.sources.sidecars import MAX_POINTER_NBYTES, change_of, refuse_pointer
from ptbin.splice import splice
from ptbin.stores import (
    NO_OPTIONS,
    ObjectStat,
    Place,
    RangeReader,
    Sides,
    Where,
    Writer,
    identity_text,
    place_of,
)
from ptbin.stores.copying import same_content
from ptbin.values.segments import FilePlan

__all__ = [
    "Unchanged",
    "change_on_copying",
    "compare_job",
    "find_unchanged",
    "is_convertible",
    "may_replace_copy",
    "release_companions",
]

Progress = Callable[[int], None]
OnDamage = Callable[[Mapping[str, Any]], object]
"""Gets what `manifests.damage.note_damage` would note: each damaged file by its name."""
Digest = str | tuple[str | None, dict[tuple[int, int], str]]
"""A file's SHA-256, or the one of what lies between its tensors, and theirs by their place."""


class _Digest(Writer):
    """Takes an output and keeps no more of it than its digests."""

    def __init__(self, plan: FilePlan, *, whole: bool) -> None:
        super().__init__(plan.name)
        tensors = [] if whole else [stored_of(tensor) for tensor in plan.tensors]
        self._hashing = OnePass(plan.plan.size, (), tensors, "file" if whole else "gaps")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._hashing.take(self.bytes_written, memoryview(data))
        self.bytes_written += len(data)

    def digest(self) -> Digest:
        found = self._hashing.finish()
        if found.sha256 is not None:
            return found.sha256
        tensors = {
            (tensor.offset, tensor.nbytes): sha256
            for tensor, sha256 in found.tensors.items()
            if tensor.nbytes
        }
        return found.gaps_sha256, tensors

    def _publish(self) -> None: ...

    def _discard(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Unchanged:
    """An output that is what its source would become now; `row`: for the index of finished work."""

    row: FinishedRow | None


def compare_job(
    job: Job,
    options: ConvertOptions,
    sides: Sides = NO_OPTIONS,
    *,
    progress: Progress | None = None,
    on_damage: OnDamage | None = None,
) -> Unchanged | None:
    """Whether the output, or the copy, is what its source would become now; None: it is to be done.

    So it is wherever that cannot be found out: the run meets the same problem and reports it. `on_damage`: as
    `find_unchanged`.
    """
    source, dest = sides.source_at(job.source_uri), sides.dest_at(job.dest_uri)
    try:
        if job.copies:
            change = change_on_copying(job.source_uri, job.output_name, options, size=job.source_size)
            copy = same_content(source, dest, change=change, progress=progress)
            return Unchanged(row_of_copy(job, "", copy, options)) if copy is not None else None
        same = find_unchanged(source, dest, options, progress=progress, on_damage=on_damage)
    except Exception:  # noqa: BLE001 - whatever it is
        return None
    return Unchanged(row_of(same.manifest, "", identity_text(same.identity))) if same is not None else None


def change_on_copying(
    source_uri: str, name: str, options: ConvertOptions, *, size: int = 0
) -> Callable[[bytes], bytes] | None:
    """What becomes of a file's content that is copied as `name`; a Git LFS pointer in its place is refused.

    `size`: in bytes, where it is known: larger files are not pointers.
    """
    change = change_of(name, options.dtype)
    if size > MAX_POINTER_NBYTES:
        return change

    def looked_at(data: bytes) -> bytes:
        refuse_pointer(data, source_uri)
        return change(data) if change is not None else data

    return looked_at


def may_replace_copy(job: Job, options: ConvertOptions) -> Callable[[str], bool] | None:
    """Which file a copy may replace, by its identity: one that the index of finished work knows.

    None: any, or a listing has shown that there is none.
    """
    standing = job.standing
    if options.force or standing is None:
        return None
    if standing.size is None and "://" in job.dest_uri:
        return None  # which spares a request
    return lambda identity: standing.is_known_copy and identity == standing.identity


def find_unchanged(
    source: Where,
    dest: Where,
    options: ConvertOptions,
    *,
    progress: Progress | None = None,
    on_damage: OnDamage | None = None,
) -> Published | None:
    """The finished output of `source` at `dest` if converting it anew would make the very same, else None.

    The manifest is brought up to date where the source has another identity now. The stored files are read as
    well: where they are not what the manifest says, that is noted in it, so that they may be replaced. A dry
    run gives `on_damage`, which gets the note instead; nothing is written then.

    Raises:
        CheckpointError: the source is damaged, unsafe, or has no single state dict.
        StorageError: a store failed.
    """
    output = place_of(dest)
    manifest_place = output.beside(MANIFEST_SUFFIX)
    try:
        data, identity = manifest_place.read_identified()
        manifest = parse_manifest(data, output.uri)
    except (NotFoundInStoreError, VerificationError):
        return None
    stored = {output["path"]: _stated_digest(output, manifest["tensors"]) for output in manifest["outputs"]}
    if manifest["options_fingerprint"] != options.fingerprint() or None in stored.values():
        return None
    if is_damaged(manifest) or not _sizes_are_right(output.parent, manifest):
        return None
    found = find_source(source)
    found.refuse_part(parts=options.parts)
    with found.open() as reader:
        if _digests(found, reader, output.name, options, stored, progress) != stored:
            return None
        if damaged := _damaged_files(output.parent, manifest, progress):
            if on_damage is not None:
                on_damage(damaged)
            else:
                note_damage(manifest_place, damaged)
            return None
        facts = {"uri": reader.uri, "size": reader.size, "identity": reader.identity.to_json()}
    if on_damage is None and {name: manifest["source"].get(name) for name in facts} != facts:
        manifest["source"].update(facts)
        written = manifest_place.write_bytes(dump_manifest(manifest))
        identity = written or manifest_place.stat().identity
    return Published(manifest, identity)


def is_convertible(source: Where, options: ConvertOptions) -> bool:
    """Whether a file is a checkpoint, judged by what of it is read before its weights are.

    One that is damaged or unsafe counts as such: it is the conversion that has to say so.

    Raises:
        StorageError: the store failed.
    """
    try:
        with find_source(source).open() as reader, as_checkpoint_errors(reader.uri):
            # Not by the options' selection: a checkpoint without what they ask for is one all the same.
            read_selected(reader, ConvertOptions(on_unsafe=options.on_unsafe, limits=options.limits))
    except (NoStateDictError, UnsupportedFormatError):
        return False
    except CheckpointError:
        return True
    return True


def release_companions(manifest_place: Where, names: Collection[str]) -> None:
    """Take files off an output's manifest that are kept by others from now on.

    Else a conversion to the same place would remove them: they are of its output before, and not of its new
    one.

    Raises:
        StorageError: the store failed.
    """
    place = place_of(manifest_place)
    try:
        manifest = parse_manifest(place.read_bytes(), place.uri)
    except (NotFoundInStoreError, VerificationError):
        return
    manifest["outputs"] = [output for output in manifest["outputs"] if output["path"] not in names]
    place.write_bytes(dump_manifest(manifest))


def _stated_digest(output: Mapping[str, Any], tensors: Iterable[Mapping[str, Any]]) -> Digest | None:
    """What proves a file's bytes: its SHA-256, or those between its tensors and of each that is stored
    contiguously; None where there is neither.
    """
    if output.get("sha256") is not None:
        return str(output["sha256"])
    if output.get("gaps_sha256") is None:
        return None
    rows = [row for row in tensors if row["file"] == output["path"] and row.get("stride") is None]
    return output["gaps_sha256"], {
        (row["offset"], row["nbytes"]): row["sha256"] for row in rows if row["nbytes"]
    }


def _sizes_are_right(folder: Place, manifest: Mapping[str, Any]) -> bool:
    try:
        return all((folder / item["path"]).stat().size == item["size"] for item in manifest["outputs"])
    except NotFoundInStoreError:
        return False


def _damaged_files(folder: Place, manifest: Mapping[str, Any], progress: Progress | None) -> dict[str, Any]:
    """The stored files that are not what the manifest says, as `note_damage` takes them."""
    damaged: dict[str, Any] = {}
    for output in manifest["outputs"]:
        rows = [row for row in manifest["tensors"] if row["file"] == output["path"]]
        with (folder / output["path"]).open_reader() as reader:
            if difference_of(reader, output, rows, progress):
                there = ObjectStat(reader.uri, reader.size, reader.identity)
                damaged[output["path"]] = damaged_file(there, digest_file(reader, [], [], progress).sha256)
    return damaged


def _digests(
    source: SourcePlace,
    reader: RangeReader,
    name: str,
    options: ConvertOptions,
    stored: Mapping[str, Any],
    progress: Progress | None,
) -> dict[str, Digest]:
    """Digest of every file that a conversion would write, by name, of the kind that is stored."""
    with as_checkpoint_errors(reader.uri):
        _, output = plan_conversion(reader, options, name)
    found: dict[str, Digest] = {}
    for plan in output.files:
        with _Digest(plan, whole=isinstance(stored.get(plan.name), str)) as writer:
            splice(plan.plan, reader, writer, progress)
            writer.commit()
        found[plan.name] = writer.digest()
    found |= {name: hashlib.sha256(data).hexdigest() for name, data in output.texts}
    reader.check_unchanged()
    for sidecar in stored.keys() - found.keys():
        try:
            data = (source.folder / sidecar).read_bytes()
        except NotFoundInStoreError:
            continue
        found[sidecar] = hashlib.sha256(data).hexdigest()
    return found
