"""The weights as the building process gets them: an archive on this machine that torch may map.

A local archive of torch's whose top is the state dict is mapped where it lies: nothing is copied. Anything
else (remote, sharded, another format, renamed) is converted into a temporary archive first. Either way the
archive's index says where each tensor lies and which CRC-32 its record has; its bytes are read only where the
restored file does not prove them (`Weights.read_rest`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptbin.conversion import Progress, convert
from ptbin.errors import VerificationError
from ptbin.manifests.drafting import draft_manifest
from ptbin.manifests.manifest import utc_now
from ptbin.options import ConvertOptions
from ptbin.proof.regions import sha256_of_tensor
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.selected import Selected, read_selected
from ptbin.restoring.facts import Facts, View, view_of
from ptbin.restoring.options import RestoreOptions
from ptbin.sources.opening import find_source
from ptbin.stores import Place, RangeReader, place_of
from ptbin.values.crc32 import confirm_crc32, crc32_of_all
from ptbin.values.digests import StoredTensor
from ptbin.values.state_dict import iter_tensors
from ptbin.values.tensors import ByteRange, TensorRef
from ptbin.writing.outputs import OutputPlan

CHUNK_NBYTES = 4 << 20
NAMED = 5


@dataclass(slots=True)
class Weights:
    """Attributes:
    archive: what torch is to map.
    manifest: what a manifest says of the source and the selection; no outputs and no tensors.
    source_names: name of each tensor to its name in the source.
    tensors: as ptbin's own reader finds them in the archive.
    """

    archive: str
    manifest: dict[str, Any]
    source_names: dict[str, str]
    tensors: dict[str, TensorRef]
    _reader: RangeReader
    _known: dict[StoredTensor, str] = field(default_factory=dict)
    _records: dict[int, ByteRange] = field(default_factory=dict)
    _proven: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for tensor in self.tensors.values():
            if isinstance(place := tensor.storage.place, ByteRange):
                self._records[place.offset] = place

    def check_given(self, given: Facts) -> None:
        """Hold what the building process had against the source.

        Raises:
            VerificationError: torch saw other weights than ptbin read.
        """
        wrong = [name for name, fact in given.items() if not self.is_given(name, fact)]
        if wrong:
            names = ", ".join(wrong[:NAMED])
            raise VerificationError(f"torch loads other weights than the source holds: {names}")

    def is_given(self, name: str, fact: Any) -> bool:
        """Whether a tensor is what the weights have under its name."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return False
        own, view = View.of_tensor(tensor), view_of(fact)
        if own is not None and own == view:
            return True
        if (fact[0].partition(" ")[0], list(fact[1])) != (tensor.dtype.name, list(tensor.shape)):
            return False
        return self.sha256_of_name(name) == (fact[2] if view is None else self.sha256_of(view))

    def crc32_at(self, offset: int) -> tuple[int, int | None] | None:
        """Size and CRC-32, as the archive states it, of the record whose bytes begin at `offset`."""
        record = self._records.get(offset)
        return None if record is None else (record.nbytes, record.crc32)

    def mark_proven(self, offset: int) -> None:
        """The record at `offset` is what the archive states, as its copy has shown."""
        self._proven.add(offset)

    def sha256_of(self, view: View) -> str:
        """Of a part of the archive, read now."""
        return self._sha256(view.stored())

    def sha256_of_name(self, name: str) -> str:
        return self._sha256(StoredTensor.of(self.tensors[name]))

    def _sha256(self, stored: StoredTensor) -> str:
        if stored not in self._known:
            self._known[stored] = sha256_of_tensor(stored, self._iter_range)
        return self._known[stored]

    def _iter_range(self, offset: int, nbytes: int) -> Iterator[bytes]:
        return self._reader.iter_range(offset, nbytes, chunk_nbytes=CHUNK_NBYTES)

    def read_rest(self) -> None:
        """Read every record that is not proven yet, against its CRC-32.

        Raises:
            ChecksumMismatchError: one is not what the archive states.
            SourceChangedError: the archive was replaced meanwhile.
        """
        for offset, record in self._records.items():
            if offset not in self._proven and record.crc32 is not None:
                found = crc32_of_all(self._iter_range(offset, record.nbytes))
                confirm_crc32(self._reader.uri, record.member, found, record.crc32)
        self._reader.check_unchanged()


@contextlib.contextmanager
def open_weights(
    source: Place,
    options: RestoreOptions,
    folder: Path,
    *,
    run_id: str | None = None,
    progress: Progress | None = None,
) -> Iterator[Weights]:
    """The weights at `source`; what has to be copied goes into `folder`. Errors as `ptbin.convert`."""
    found = find_source(source)
    conversion = options.conversion()
    found.refuse_part(parts=conversion.parts)
    with found.open() as reader:
        if reader.is_local and reader.fileno() is not None:
            with as_checkpoint_errors(reader.uri):
                selected = read_selected(reader, conversion)
            if _is_mappable(selected):
                manifest = draft_manifest(reader, selected, OutputPlan(()), (), ())
                if run_id is not None:
                    manifest["run_id"] = run_id
                manifest["started_at"] = utc_now()
                manifest["bytes_read"] = reader.size
                tensors = dict(iter_tensors(selected.state_dict.entries))
                yield Weights(found.place.path, manifest, {}, tensors, reader)
                return
    archive = place_of(folder / "weights.bin")
    manifest = convert(source, archive, conversion, run_id=run_id, progress=progress)
    source_names = {row["name"]: row["source_name"] for row in manifest["tensors"]}
    with archive.open_reader() as reader:
        selected = read_selected(reader, ConvertOptions(select="."))
        tensors = dict(iter_tensors(selected.state_dict.entries))
        yield Weights(archive.path, manifest, source_names, tensors, reader)


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
            for _, tensor in iter_tensors(state_dict.entries)
        )
    )
