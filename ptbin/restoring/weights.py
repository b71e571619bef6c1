"""The weights as the building process gets them: an archive on this machine that torch may map.

A local archive of torch's whose top is the state dict is mapped where it lies: nothing is copied, and its
bytes are proven here while the other process builds the model. Anything else (remote, sharded, another
format, renamed) is converted into a temporary archive first.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ptbin.conversion import Progress, convert
from ptbin.drafting import draft_manifest
from ptbin.errors import ChecksumMismatchError, VerificationError
from ptbin.manifest import utc_now
from ptbin.proof.logical import iter_logical_bytes
from ptbin.reading.checkpoint import one_clear_error
from ptbin.reading.selected import Selected, read_selected
from ptbin.restoring.options import RestoreOptions
from ptbin.sources import find_source
from ptbin.state_dict import tensors_of
from ptbin.tensors import ByteRange, TensorRef
from ptbin.writing.outputs import OutputPlan

if TYPE_CHECKING:
    from ptbin.stores import RangeReader

__all__ = ["Weights", "open_weights"]

CHUNK_NBYTES = 4 << 20
NAMED = 5


@dataclass(slots=True)
class Weights:
    """Attributes:
    archive: what torch is to map.
    manifest: what a manifest says of the source and the selection; no outputs and no tensors.
    source_names: name of each tensor to its name in the source.
    """

    archive: str
    manifest: dict[str, Any]
    source_names: dict[str, str]
    _proof: _Proof

    def compare(self, given: Mapping[str, str], views: Mapping[str, list[Any]]) -> None:
        """Hold what the building process had against the source.

        Args:
            given: SHA-256 of each tensor as that process saw it.
            views: what each is of the archive, where it is mapped (`snapshot.mapped_views`).

        Raises:
            VerificationError: torch saw other weights than ptbin read.
            ChecksumMismatchError: a record is not what the archive states.
            SourceChangedError: the archive was replaced meanwhile.
        """
        wrong = self._proof.differing(given, views)
        if wrong:
            names = ", ".join(wrong[:NAMED])
            raise VerificationError(f"torch loads other weights than the source holds: {names}")


class _Proof(Protocol):
    def differing(self, given: Mapping[str, str], views: Mapping[str, list[Any]]) -> list[str]:
        """Names of tensors that are not the source's."""


@dataclass(slots=True)
class _Converted:
    """Of a temporary archive: the conversion has proven it and knows its digests."""

    digests: dict[str, str]

    def differing(self, given: Mapping[str, str], views: Mapping[str, list[Any]]) -> list[str]:
        del views
        wrong = [name for name, digest in self.digests.items() if given.get(name, digest) != digest]
        return wrong + [name for name in given if name not in self.digests]


@dataclass(slots=True)
class _Mapped:
    """Of an archive mapped where it lies: its records hold by their CRC-32s, and torch mapped these ranges.

    So each byte is read once here, and no second SHA-256 is made of it. A tensor of which the other process
    cannot say what it is of the file is hashed.
    """

    tensors: dict[str, TensorRef]
    reader: RangeReader
    read: Future[None]

    def differing(self, given: Mapping[str, str], views: Mapping[str, list[Any]]) -> list[str]:
        self.read.result()
        wrong = [name for name in given if name not in self.tensors]
        for name, tensor in self.tensors.items():
            place = tensor.storage.place
            assert isinstance(place, ByteRange)
            own = [
                place.offset,
                tensor.storage_offset,
                list(tensor.shape),
                list(tensor.stride),
                tensor.dtype.name,
            ]
            if name in given and views.get(name) != own and given[name] != _sha256(tensor, self.reader):
                wrong.append(name)
        self.reader.check_unchanged()
        return wrong


@contextlib.contextmanager
def open_weights(
    source: str,
    options: RestoreOptions,
    folder: Path,
    *,
    source_options: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
) -> Iterator[Weights]:
    """The weights at `source`; what has to be copied goes into `folder`. Errors as `ptbin.convert`."""
    place = find_source(source, source_options)
    conversion = options.conversion()
    place.refuse_part(parts=conversion.parts)
    with place.open() as reader, ThreadPoolExecutor(1) as pool:
        if reader.is_local and reader.fileno() is not None:
            with one_clear_error(reader.uri):
                selected = read_selected(reader, conversion)
            if _is_mappable(selected):
                nothing = OutputPlan(())
                manifest = draft_manifest(reader, selected, nothing, (), ())
                if run_id is not None:
                    manifest["run_id"] = run_id
                manifest["started_at"] = utc_now()
                manifest["bytes_read"] = reader.size
                tensors = {
                    label: tensor
                    for name, value in selected.state_dict.entries
                    for label, tensor in tensors_of(name, value)
                }
                read = pool.submit(_read_records, list(tensors.values()), reader, progress)
                yield Weights(place.path, manifest, {}, _Mapped(tensors, reader, read))
                return
    archive = str(folder / "weights.bin")
    manifest = convert(
        source, archive, conversion, source_options=source_options, run_id=run_id, progress=progress
    )
    rows = manifest["tensors"]
    digests = {row["name"]: row["sha256"] for row in rows}
    yield Weights(archive, manifest, {row["name"]: row["source_name"] for row in rows}, _Converted(digests))


def _is_mappable(selected: Selected) -> bool:
    """Whether `torch.load` of the file itself gives just this state dict, under these names."""
    if len(selected.state_dicts) != 1:
        return False
    state_dict = selected.state_dict
    return (
        selected.checkpoint.container == "torch_zip"
        and state_dict.path == "."
        and state_dict.kind == "mapping"
        and selected.safety.verdict == "safe"
        and not state_dict.excluded
        and not selected.accounting.left_out
        and not state_dict.source_names
        and all(
            isinstance(tensor.storage.place, ByteRange) and not tensor.storage.big_endian
            for name, value in state_dict.entries
            for _, tensor in tensors_of(name, value)
        )
    )


def _read_records(tensors: list[TensorRef], reader: RangeReader, progress: Progress | None) -> None:
    """Read every record once, against its CRC-32.

    Raises:
        ChecksumMismatchError: one is not what the archive states.
    """
    storages = {id(tensor.storage): tensor.storage for tensor in tensors}
    for storage in storages.values():
        place = storage.place
        assert isinstance(place, ByteRange)
        crc = 0
        for piece in reader.iter_range(place.offset, place.nbytes, chunk_nbytes=CHUNK_NBYTES):
            crc = zlib.crc32(piece, crc)
            if progress is not None:
                progress(len(piece))
        if place.crc32 is not None and crc != place.crc32:
            raise ChecksumMismatchError(
                f"{reader.uri}: {place.member} has CRC-32 {crc:08x}, the archive states {place.crc32:08x}; "
                "the file is damaged"
            )


def _sha256(tensor: TensorRef, reader: RangeReader) -> str:
    digest = hashlib.sha256()
    for piece in iter_logical_bytes(tensor, reader):
        digest.update(piece)
    return digest.hexdigest()
