"""The manifest of an output that is written and not yet proven: everything but digests. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptbin.manifests.draft import DraftFile, DraftRecord
from ptbin.manifests.manifest import SCHEMA_VERSION, hex_crc32
from ptbin.reading.selected import Selected
from ptbin.splice import SpliceResult
from ptbin.stores import RangeReader
from ptbin.stores.joined import JoinedReader
from ptbin.values.digests import FileDigests, StoredTensor
from ptbin.values.segments import FilePlan, PlannedTensor, RecordLayout
from ptbin.values.state_dict import StateDict, iter_tensors
from ptbin.version import __version__
from ptbin.writing.outputs import OutputPlan

Written = tuple[FilePlan, SpliceResult, "FileDigests | None"]
"""A file's plan, what came of it, and its digests where it is proven already."""


def draft_manifest(
    reader: RangeReader,
    selected: Selected,
    output: OutputPlan,
    written: Sequence[Written],
    files: Sequence[DraftFile],
) -> dict[str, Any]:
    """What is known once everything is written; run id and times are the caller's to add."""
    options, accounting = selected.options, selected.accounting
    source: dict[str, Any] = {
        "uri": reader.uri,
        "size": reader.size,
        "identity": reader.identity.to_json(),
        "container": selected.checkpoint.container,
    }
    if isinstance(reader, JoinedReader):
        source["files"] = [
            {
                "path": part.path,
                "size": part.size,
                "identity": part.identity.to_json() if part.identity is not None else None,
            }
            for part in reader.parts
        ]
    return {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "selected": selected.path,
        "options": options.to_json(),
        "options_fingerprint": options.fingerprint(),
        "outputs": [_output_row(file) for file in files],
        "tensors": _tensor_rows(written, output.owners, selected.state_dicts, accounting.credits),
        "left_out": [item.to_json() for item in (*accounting.left_out, *output.left_out)],
        "accounting": accounting.to_json(),
        "globals": selected.safety.to_json(),
        "safety": {"verdict": selected.safety.verdict, "findings": list(selected.safety.findings)},
        "verification": {},
        "tool": {"name": "ptbin", "version": __version__},
    }


def _output_row(file: DraftFile) -> dict[str, Any]:
    row = {"path": file.path, "size": file.size, "sha256": file.sha256, "crc32": hex_crc32(file.crc32)}
    if file.gaps_sha256 is not None:
        row["gaps_sha256"] = file.gaps_sha256
    return row


def draft_file(plan: FilePlan, result: SpliceResult, copied_nbytes: int = 0) -> DraftFile:
    """What the manifest will say of a file that was written, of which the store copied `copied_nbytes`."""
    records = tuple(
        DraftRecord(record.offset, record.nbytes, record.checksum.value(result.crcs))
        for record in plan.plan.records
    )
    return DraftFile(plan.name, plan.plan.size, result.crc32, records, copied_nbytes)


def stored_of(planned: PlannedTensor) -> StoredTensor:
    """Where a planned tensor lies in its file."""
    return StoredTensor(
        planned.offset,
        planned.nbytes,
        tuple(planned.source.shape),
        planned.stride,
        planned.dtype.itemsize,
        planned.dtype.per_unit,
    )


def _tensor_rows(
    written: Sequence[Written],
    owners: Sequence[int],
    state_dicts: Sequence[StateDict],
    shares: Sequence[int],
) -> list[dict[str, Any]]:
    rows = []
    accounted = _by_label(state_dicts, shares)
    for (file, result, digests), owner in zip(written, owners, strict=True):
        records = {record.key: record for record in file.plan.records}
        first_on: dict[str, str] = {}
        for planned in file.tensors:
            record = records[planned.record]
            row = _row(file.name, planned, record, result, state_dicts[owner])
            if digests is not None:
                row["sha256"] = digests.tensors[stored_of(planned)]
            if record.nbytes and record.key in first_on:
                row["shares_with"] = first_on[record.key]
            first_on.setdefault(record.key, planned.name)
            if (taken := accounted[owner][planned.name]) != row["nbytes"]:
                row["source_nbytes"] = taken
            rows.append(row)
    return rows


def _by_label(state_dicts: Sequence[StateDict], shares: Sequence[int]) -> list[dict[str, int]]:
    """For each state dict, the bytes of the source that each tensor accounts for."""
    numbers = iter(shares)
    return [{label: next(numbers) for label, _ in iter_tensors(found.entries)} for found in state_dicts]


def _row(
    file: str, planned: PlannedTensor, record: RecordLayout, result: SpliceResult, state_dict: StateDict
) -> dict[str, Any]:
    tensor = planned.source
    row: dict[str, Any] = {
        "name": planned.name,
        "source_name": _source_name(state_dict, planned.name),
        "dtype": planned.dtype.name,
        "shape": list(tensor.shape),
        "nbytes": planned.nbytes,
        "file": file,
        "offset": planned.offset,
        "sha256": None,
    }
    if (planned.offset, planned.nbytes, planned.stride) == (record.offset, record.nbytes, None):
        row["crc32"] = hex_crc32(record.checksum.value(result.crcs))
    if planned.stride is not None:
        row["stride"] = list(planned.stride)
    if tensor.flags:
        row["lazy"] = list(tensor.flags)
    if planned.dtype is not tensor.dtype:
        row["cast_from"] = tensor.dtype.name
        if record.key in result.overflowed:
            row["overflowed"] = result.overflowed[record.key]
    if not result.confirmed.issuperset(record.taken_in_part):
        row["source_checked"] = False
    return row


def _source_name(state_dict: StateDict, name: str) -> str:
    owner = name.split("#", 1)[0]
    source = state_dict.source_names.get(owner)
    return name if source is None else source + name[len(owner) :]
