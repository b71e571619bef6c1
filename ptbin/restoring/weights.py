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
from typing import TYPE_CHECKING, Any

from ptbin.conversion import Progress, convert
from ptbin.drafting import draft_manifest
from ptbin.errors import ChecksumMismatchError
from ptbin.manifest import utc_now
from ptbin.proof.logical import iter_logical_bytes
from ptbin.reading.checkpoint import one_clear_error
from ptbin.reading.selected import Selected, read_selected
from ptbin.restoring.options import RestoreOptions
from ptbin.sources import find_source
from ptbin.state_dict import StateDict, tensors_of
from ptbin.tensors import ByteRange, TensorRef
from ptbin.writing.outputs import OutputPlan

if TYPE_CHECKING:
    from ptbin.stores import RangeReader

__all__ = ["Weights", "open_weights"]

CHUNK_NBYTES = 4 << 20
LANES = 2
"""Threads that hash while the other process imports torch and builds the model."""


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
    _digests: Future[dict[str, str]]

    def digests(self) -> dict[str, str]:
        """SHA-256 of each tensor by its label, once the archive is proven.

        Raises:
            ChecksumMismatchError: a record is not what the archive states.
            SourceChangedError: the archive was replaced meanwhile.
        """
        return self._digests.result()


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
                yield Weights(
                    place.path, manifest, {}, pool.submit(_prove, selected.state_dict, reader, progress)
                )
                return
    archive = str(folder / "weights.bin")
    manifest = convert(
        source, archive, conversion, source_options=source_options, run_id=run_id, progress=progress
    )
    rows = manifest["tensors"]
    proven: Future[dict[str, str]] = Future()
    proven.set_result({row["name"]: row["sha256"] for row in rows})
    yield Weights(archive, manifest, {row["name"]: row["source_name"] for row in rows}, proven)


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


def _prove(state_dict: StateDict, reader: RangeReader, progress: Progress | None) -> dict[str, str]:
    """Read every record once, against its CRC-32; the SHA-256 of each tensor."""
    by_storage: dict[int, list[tuple[str, TensorRef]]] = {}
    for name, value in state_dict.entries:
        for label, tensor in tensors_of(name, value):
            by_storage.setdefault(id(tensor.storage), []).append((label, tensor))

    def prove(tensors: list[tuple[str, TensorRef]]) -> dict[str, str]:
        storage = tensors[0][1].storage
        place = storage.place
        assert isinstance(place, ByteRange)
        whole, crc = hashlib.sha256(), 0
        for piece in reader.iter_range(place.offset, place.nbytes, chunk_nbytes=CHUNK_NBYTES):
            crc = zlib.crc32(piece, crc)
            whole.update(piece)
            if progress is not None:
                progress(len(piece))
        if place.crc32 is not None and crc != place.crc32:
            raise ChecksumMismatchError(
                f"{reader.uri}: {place.member} has CRC-32 {crc:08x}, the archive states {place.crc32:08x}; "
                "the file is damaged"
            )
        return {
            label: whole.hexdigest() if _is_all_of(tensor, place.nbytes) else _sha256(tensor, reader)
            for label, tensor in tensors
        }

    found: dict[str, str] = {}
    with ThreadPoolExecutor(LANES) as pool:
        for digests in pool.map(prove, by_storage.values()):
            found |= digests
    reader.check_unchanged()
    return found


def _is_all_of(tensor: TensorRef, nbytes: int) -> bool:
    return tensor.contiguous and tensor.span == (0, nbytes) and not tensor.flags


def _sha256(tensor: TensorRef, reader: RangeReader) -> str:
    digest = hashlib.sha256()
    for piece in iter_logical_bytes(tensor, reader):
        digest.update(piece)
    return digest.hexdigest()
