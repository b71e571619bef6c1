"""Proof of a small output before it is sent: all of its bytes are still in memory.

They are what the source states, and read anew they hold what was planned. Whether the store has them is for
its answer to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptbin.errors import VerificationError
from ptbin.proof.digests import OnePass
from ptbin.proof.output import check_structure, compare_checksums
from ptbin.stores.reader import RangeReader
from ptbin.stores.values import Identity
from ptbin.values.digests import FileDigests, StoredTensor

if TYPE_CHECKING:
    from ptbin.manifests.draft import DraftFile
    from ptbin.options import ConvertOptions
    from ptbin.proof.serial import Serial
    from ptbin.values.segments import FilePlan

__all__ = ["prove_held"]


class _HeldReader(RangeReader):
    """Reads what is to be sent."""

    def __init__(self, uri: str, data: bytearray) -> None:
        super().__init__(uri, len(data), Identity("uid", ""))
        self._data = data

    def _read(self, offset: int, nbytes: int) -> bytes:
        return bytes(memoryview(self._data)[offset : offset + nbytes])

    def check_unchanged(self) -> None:
        """Nothing else writes to it."""


def prove_held(
    data: bytearray,
    uri: str,
    file: DraftFile,
    plan: FilePlan,
    places: Sequence[StoredTensor],
    options: ConvertOptions,
    serial: Serial,
) -> FileDigests:
    """The digests of `data`, which is what `file` says and what `plan` means.

    Args:
        places: of the plan's tensors.

    Raises:
        VerificationError: with the first difference found.
    """
    if len(data) != file.size:
        raise VerificationError(f"{uri}: {len(data)} bytes are to be sent, {file.size} were planned")
    reader = _HeldReader(uri, data)
    hashing = OnePass(file.size, [(r.offset, r.nbytes) for r in file.records], places, serial)
    hashing.take(0, memoryview(data))
    digests = hashing.finish(reader.iter_range)
    names = [(tensor.name, tensor.offset) for tensor in plan.tensors]
    compare_checksums(uri, file, names, digests, VerificationError)
    rows = [
        {"name": t.name, "dtype": t.dtype.name, "shape": list(t.source.shape), "offset": t.offset}
        for t in plan.tensors
    ]
    check_structure(reader, options.limits, options.format, rows)
    return digests
