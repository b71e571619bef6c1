"""Proof of a fresh output, before its manifest may exist.

`checksum`: the stored output is opened anew by the reading room, its tensors must be the planned ones
by name, type, shape and place; then every byte is read back. The whole file's CRC-32 must equal the one
combined from the source's own checksums, each record's must equal the source's, and the SHA-256s found
go into the manifest.

A small output for an object store was proven before it was sent (`held`). Where the store has answered with
the MD5 of those bytes, none of them is read again.

Where an object store copied the weights by itself and keeps a CRC-32 of the whole object, computed from the
bytes it holds, that number takes the place of reading them: equal to the one combined from the source's
checksums, it proves the same. The index is read and compared all the same.

`load`: torch opens it as well (`weights_only=True`), and every tensor's bytes are compared with the
source's, read again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptbin.errors import CheckpointError, ChecksumMismatchError, VerificationError
from ptbin.manifests.manifest import hex_crc32, rows_by_file
from ptbin.options import Limits
from ptbin.proof.digests import digest_file
from ptbin.proof.serial import serial_of
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.containers.source import RandomReader
from ptbin.reading.pickle.gc_pause import gc_paused
from ptbin.reading.pickle.verdicts import judge_programs
from ptbin.reading.selection import select_state_dict
from ptbin.sources.part_names import INDEX_SUFFIX
from ptbin.stores import Place, RangeReader, identity_text
from ptbin.values.digests import FileDigests, StoredTensor
from ptbin.values.dtypes import BY_NAME
from ptbin.values.state_dict import iter_tensors
from ptbin.values.tensors import ByteRange, TensorRef, extent_of

if TYPE_CHECKING:
    from ptbin.manifests.draft import Draft, DraftFile

READ_BACK = "read back"
STORE_CHECKSUM = "store checksum"


# As `Limits.expanded_nbytes`: a stride 0 in a manifest must not keep a verifier busy for days.
MAX_UNFOLDED_NBYTES = 1 << 30


def prove_output(
    draft: Draft,
    source: Place,
    dest: Place,
    *,
    progress: Callable[[int], None] | None = None,
    identities: dict[str, str] | None = None,
) -> str:
    """Prove the output of `draft` and fill its manifest's digests in; return what proved it.

    Args:
        identities: gets, by its name, which state of each file was proven.

    Raises:
        VerificationError: with the first difference found.
        ChecksumMismatchError: the difference is in bytes that the store copied: the source holds them so.
    """
    proven_by = READ_BACK
    rows_of = rows_by_file(draft.manifest["tensors"])
    for file, output in zip(draft.files, draft.manifest["outputs"], strict=True):
        if file.acknowledged:
            proven_by = STORE_CHECKSUM
            continue
        rows = rows_of.get(file.path, [])
        place = dest.parent / file.path
        with place.open_reader() as reader:
            if identities is not None and (seen := identity_text(reader.identity)):
                identities[file.path] = seen
            if file.is_proven:
                _check_same(reader, file, rows, draft)
                continue
            # Provenance names the SHA-256 of every output, which no store states.
            if draft.level == "checksum" and file.copied_nbytes and "provenance" not in draft.manifest:
                stated = place.store.crc32_of(place.path)
                if stated is not None:
                    _prove_by_store(reader, file, rows, draft, stated)
                    proven_by = STORE_CHECKSUM
                    continue
            digests = _prove_file(reader, file, rows, draft, progress)
            output["sha256"] = digests.sha256
            if digests.gaps_sha256 is not None:
                output["gaps_sha256"] = digests.gaps_sha256
    if draft.manifest["options"]["format"] == "raw":
        _check_raw_indexes(dest.parent, draft.manifest)
    if draft.level == "load":
        from ptbin.proof.load import prove_by_loading

        prove_by_loading(draft, source, dest)
    return proven_by


def _prove_by_store(
    reader: RangeReader, file: DraftFile, rows: list[dict[str, Any]], draft: Draft, stated: int
) -> None:
    _check_size(reader, file)
    _check_structure(reader, draft, rows)
    if stated != file.crc32:
        raise ChecksumMismatchError(
            f"{reader.uri}: the store states CRC-32 {hex_crc32(stated)} for what it copied, the source's "
            f"checksums come to {hex_crc32(file.crc32)}: the source was damaged after it was written"
        )
    reader.check_unchanged()


def _check_same(reader: RangeReader, file: DraftFile, rows: list[dict[str, Any]], draft: Draft) -> None:
    """A file that was proven before it got its name is still that file, and its index, read anew, is the
    planned one.
    """
    _check_size(reader, file)
    _check_structure(reader, draft, rows)
    if identity_text(reader.identity) != file.identity:
        raise VerificationError(f"{reader.uri}: was written to after it was proven")


def _check_size(reader: RangeReader, file: DraftFile) -> None:
    if reader.size != file.size:
        raise VerificationError(f"{reader.uri}: {reader.size} bytes are stored, {file.size} were written")


def _prove_file(
    reader: RangeReader,
    file: DraftFile,
    rows: list[dict[str, Any]],
    draft: Draft,
    progress: Callable[[int], None] | None,
) -> FileDigests:
    """Digests of the file, once it has proven to be what was meant; its tensors' rows get theirs."""
    _check_size(reader, file)
    _check_structure(reader, draft, rows)
    # What the store copied differs from what the source states only where the source itself does.
    wrong = ChecksumMismatchError if file.copied_nbytes else VerificationError
    places = [stored_tensor(row, file.size) for row in rows]
    serial = serial_of(draft.file_digest) if rows else "file"
    records = [(r.offset, r.nbytes) for r in file.records]
    digests = digest_file(reader, records, places, progress, serial=serial)
    compare_checksums(reader.uri, file, [(row["name"], row["offset"]) for row in rows], digests, wrong)
    reader.confirm()
    for row, place in zip(rows, places, strict=True):
        row["sha256"] = digests.tensors[place]
    return digests


def compare_checksums(
    uri: str,
    file: DraftFile,
    tensors: Sequence[tuple[str, int]],
    digests: FileDigests,
    wrong: type[VerificationError | ChecksumMismatchError],
) -> None:
    """Raise `wrong` where a record or the file has another CRC-32; `tensors` are names and offsets, to
    tell.
    """
    for record in file.records:
        found = digests.records[record.offset, record.nbytes]
        if found != record.crc32:
            names = [name for name, offset in tensors if record.holds(offset)]
            raise wrong(
                f"{uri}: bytes {record.offset} to "
                f"{record.offset + record.nbytes} ({', '.join(names[:3])}) "
                f"have CRC-32 {hex_crc32(found)}, the source states {hex_crc32(record.crc32)}"
            )
    if digests.crc32 != file.crc32:
        raise wrong(
            f"{uri}: the file has CRC-32 {hex_crc32(digests.crc32)}, expected {hex_crc32(file.crc32)}"
        )


def _check_raw_indexes(folder: Place, manifest: Mapping[str, Any]) -> None:
    """The stored indexes of format `raw`, one for each state dict, say of every tensor what was planned.

    Raises:
        VerificationError: they say something else.
    """
    keys = ("dtype", "shape", "file", "offset", "nbytes")
    planned = {(row["file"], row["name"]): {key: row[key] for key in keys} for row in manifest["tensors"]}
    count = 0
    for output in manifest["outputs"]:
        if not output["path"].endswith(INDEX_SUFFIX):
            continue
        file = folder / output["path"]
        try:
            index = json.loads(file.read_bytes())
            found = {(row["file"], name): dict(row) for name, row in index["tensors"].items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise VerificationError(f"{file.uri}: what was stored is not an index: {error}") from error
        count += len(found)
        if any(planned.get(place) != row for place, row in found.items()):
            raise VerificationError(f"{file.uri}: the stored index is not the planned one")
    if count != len(planned):
        raise VerificationError(
            f"{folder.uri}: the indexes list {count} tensors, {len(planned)} were written"
        )


def stored_tensor(row: Mapping[str, Any], file_size: int | None = None) -> StoredTensor:
    """Where a manifest's tensor lies; inside a file of `file_size` bytes, where that is given.

    Raises:
        VerificationError: an unknown type, or numbers that are not consistent.
    """
    wrong = VerificationError(f"the manifest describes tensor {str(row.get('name'))[:200]!r} inconsistently")
    name, dtype_name, shape, stride = row.get("name"), row.get("dtype"), row.get("shape"), row.get("stride")
    dtype = BY_NAME.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None or not isinstance(name, str) or not isinstance(shape, list) or len(shape) > 64:
        raise wrong
    if stride is not None and (not isinstance(stride, list) or len(stride) != len(shape)):
        raise wrong
    offset, nbytes = row.get("offset"), row.get("nbytes")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, nbytes, *shape, *(stride or ()))):
        raise wrong
    assert isinstance(offset, int)
    if nbytes != dtype.nbytes_of(math.prod(shape)):
        raise wrong
    sizes, strides = tuple(shape), None if stride is None else tuple(stride)
    end = offset + (nbytes if strides is None else dtype.nbytes_of(extent_of(sizes, strides)))
    if file_size is not None and (end > file_size or nbytes > max(file_size, MAX_UNFOLDED_NBYTES)):
        raise wrong
    return StoredTensor(offset, nbytes, sizes, strides, dtype.itemsize, dtype.per_unit)


def _check_structure(reader: RangeReader, draft: Draft, rows: list[dict[str, Any]]) -> None:
    check_structure(reader, draft.limits, draft.manifest["options"]["format"], rows)


def check_structure(
    reader: RandomReader, limits: Limits, output_format: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """The stored file, read anew, holds exactly the tensors that were planned, where they were planned.

    Of format `raw` its index says so, which is another file.
    """
    if not rows or output_format == "raw":
        return
    with gc_paused():
        _compare_index(reader, limits, output_format, rows)


def _compare_index(
    reader: RandomReader, limits: Limits, output_format: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    try:
        checkpoint = read_checkpoint(reader, limits)
        safety = judge_programs(checkpoint.programs)
        if safety.verdict != "safe":
            raise VerificationError(f"{reader.uri}: the output's own pickle is not safe: {safety.globals}")
        state_dict = select_state_dict(checkpoint, ".")
    except CheckpointError as error:
        raise VerificationError(f"what was stored cannot be read: {error}") from error
    found = list(iter_tensors(state_dict.entries))
    if len(found) != len(rows):
        raise VerificationError(f"{reader.uri}: {len(found)} tensors are stored, {len(rows)} were planned")
    if output_format == "safetensors":
        found.sort(key=lambda item: item[0])  # the header's order says nothing
        rows = sorted(rows, key=lambda row: str(row["name"]))
    for (name, tensor), row in zip(found, rows, strict=True):
        stored = (name, tensor.dtype.name, list(tensor.shape), _offset(tensor))
        planned = (row["name"], row["dtype"], row["shape"], row["offset"] if tensor.numel else 0)
        if stored != planned:
            raise VerificationError(f"{reader.uri}: found tensor {stored}, expected {planned}")


def _offset(tensor: TensorRef) -> int:
    place = tensor.storage.place
    if not isinstance(place, ByteRange):
        raise VerificationError(f"storage {tensor.storage.key!r} is not stored plainly")
    return place.offset + tensor.span[0] if tensor.numel else 0
