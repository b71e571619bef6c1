"""Proof of a small output before it is sent: all of its bytes are still in memory.

They are what the source states, and read anew they hold what was planned. The store's answer says whether it
has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptbin.errors import VerificationError
from ptbin.options import ConvertOptions
from ptbin.proof.digests import OnePass
from ptbin.proof.output import check_structure, compare_checksums
from ptbin.proof.serial import Serial
from ptbin.reading.containers.source import MemoryReader
from ptbin.values.digests import FileDigests, StoredTensor

if TYPE_CHECKING:
    from ptbin.manifests.draft import DraftFile
    from ptbin.values.segments import FilePlan


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
    reader = MemoryReader(data, uri)
    hashing = OnePass(file.size, [(r.offset, r.nbytes) for r in file.records], places, serial)
    hashing.take(0, memoryview(data))
    digests = hashing.finish(lambda offset, nbytes: iter([reader.read(offset, nbytes)]))
    names = [(tensor.name, tensor.offset) for tensor in plan.tensors]
    compare_checksums(uri, file, names, digests, VerificationError)
    rows = [
        {"name": t.name, "dtype": t.dtype.name, "shape": list(t.source.shape), "offset": t.offset}
        for t in plan.tensors
    ]
    check_structure(reader, options.limits, options.format, rows)
    return digests
