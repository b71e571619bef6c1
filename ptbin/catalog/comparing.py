"""What a mirror asks of content: would a conversion change anything, is a file a checkpoint at all.

An output is a pure function of its source's bytes and the options, so it is made once more, into nothing but
a digest, and the digest is held against the manifest. That reads the weights and writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ptbin.conversion import Published, plan_conversion
from ptbin.errors import (
    CheckpointError,
    NoStateDictError,
    NotFoundInStoreError,
    UnsupportedFormatError,
    VerificationError,
)
from ptbin.manifests.damage import damaged_file, is_damaged, note_damage
from ptbin.manifests.manifest import MANIFEST_SUFFIX, dump_manifest, parse_manifest
from ptbin.options import ConvertOptions
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.selected import read_selected
from ptbin.sources.opening import SourcePlace, find_source
from ptbin.splice import splice
from ptbin.stores import ObjectStat, Place, RangeReader, Where, Writer, place_of

__all__ = ["find_unchanged", "is_convertible", "release_companions"]

Progress = Callable[[int], None]


class _Digest(Writer):
    """Takes an output and keeps its SHA-256."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sha256.update(data)
        self.bytes_written += len(data)

    def _publish(self) -> None: ...

    def _discard(self) -> None: ...


def find_unchanged(
    source: Where,
    dest: Where,
    options: ConvertOptions,
    *,
    progress: Progress | None = None,
) -> Published | None:
    """The finished output of `source` at `dest` if converting it anew would make the very same, else None.

    The manifest is brought up to date where the source has another identity now. The stored files are read as
    well: where they are not what the manifest says, that is noted in it, so that they may be replaced.

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
    stored = {output["path"]: output.get("sha256") for output in manifest["outputs"]}
    if manifest["options_fingerprint"] != options.fingerprint() or None in stored.values():
        return None
    if is_damaged(manifest) or not _sizes_are_right(output.parent, manifest):
        return None
    found = find_source(source)
    found.refuse_part(parts=options.parts)
    with found.open() as reader:
        if _digests(found, reader, output.name, options, stored, progress) != stored:
            return None
        if damaged := _damaged_files(output.parent, stored, progress):
            note_damage(manifest_place, damaged)
            return None
        facts = {"uri": reader.uri, "size": reader.size, "identity": reader.identity.to_json()}
    if {name: manifest["source"].get(name) for name in facts} != facts:
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


def _sizes_are_right(folder: Place, manifest: Mapping[str, Any]) -> bool:
    try:
        return all((folder / item["path"]).stat().size == item["size"] for item in manifest["outputs"])
    except NotFoundInStoreError:
        return False


def _damaged_files(folder: Place, stored: Mapping[str, Any], progress: Progress | None) -> dict[str, Any]:
    """Of the stored files, those that do not have their SHA-256, and what is there instead."""
    found = {}
    for name, expected in stored.items():
        digest = hashlib.sha256()
        with (folder / name).open_reader() as reader:
            for piece in reader.iter_range(0, reader.size):
                digest.update(piece)
                if progress is not None:
                    progress(0)
            there = ObjectStat(reader.uri, reader.size, reader.identity)
        if digest.hexdigest() != expected:
            found[name] = damaged_file(there, digest.hexdigest())
    return found


def _digests(
    source: SourcePlace,
    reader: RangeReader,
    name: str,
    options: ConvertOptions,
    stored: Mapping[str, Any],
    progress: Progress | None,
) -> dict[str, str]:
    """SHA-256 of every file that a conversion would write, by name."""
    with as_checkpoint_errors(reader.uri):
        _, output = plan_conversion(reader, options, name)
    found: dict[str, str] = {}
    for plan in output.files:
        with _Digest(plan.name) as writer:
            splice(plan.plan, reader, writer, progress)
            writer.commit()
        found[plan.name] = writer.sha256.hexdigest()
    found |= {name: hashlib.sha256(data).hexdigest() for name, data in output.texts}
    reader.check_unchanged()
    for sidecar in stored.keys() - found.keys():
        try:
            data = (source.folder / sidecar).read_bytes()
        except NotFoundInStoreError:
            continue
        found[sidecar] = hashlib.sha256(data).hexdigest()
    return found
