"""One checkpoint to one `.bin`: read, select, plan, splice, prove, and only then the manifest.

`stage` writes the output and returns a `Draft`; the output does not count yet. `commit` proves it and
writes the manifest. The two halves may run in different processes; a draft is one string. `convert` is
both. Killed at any instant, what remains is either nothing, an output without a manifest, or both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from ptbin.draft import Draft, DraftRecord
from ptbin.errors import (
    CheckpointError,
    UsageError,
    VerificationError,
)
from ptbin.manifest import MANIFEST_SUFFIX, SCHEMA_VERSION, dump_manifest, hex_crc32, utc_now
from ptbin.options import ConvertOptions
from ptbin.reading.checkpoint import Checkpoint, one_clear_error
from ptbin.reading.selected import read_selected
from ptbin.reading.verdicts import SafetyReport
from ptbin.segments import RecordLayout
from ptbin.splice import SpliceResult, splice
from ptbin.state_dict import StateDict
from ptbin.stores import Identity, RangeReader, Store, open_store, public_uri
from ptbin.version import __version__
from ptbin.writing.torch_format import PlannedTensor, TorchPlan, plan_torch_archive

__all__ = ["commit", "convert", "stage"]

Progress = Callable[[int], None]


def convert(
    source: str,
    dest: str,
    options: ConvertOptions | None = None,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert one checkpoint and return its manifest.

    Args:
        source: local path or fsspec URL of one checkpoint.
        dest: where the output goes; its manifest goes beside it.
        source_options, dest_options: fsspec storage options; they never reach manifests or messages.
        progress: called with the bytes moved since its last call.

    Raises:
        CheckpointError: the checkpoint is damaged, unsafe, or has no single state dict.
        VerificationError: what was stored is not what the source says; the output is removed.
        StorageError: a store failed. UsageError: the call is wrong.
    """
    draft = stage(
        source,
        dest,
        options,
        source_options=source_options,
        dest_options=dest_options,
        run_id=run_id,
        progress=progress,
    )
    return commit(draft, source_options=source_options, dest_options=dest_options, progress=progress)


def stage(
    source: str,
    dest: str,
    options: ConvertOptions | None = None,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
) -> Draft:
    """Write the output, without its manifest. Arguments and errors as `convert`."""
    options = options or ConvertOptions()
    started = time.time()
    source_store, source_path = open_store(source, source_options)
    dest_store, dest_path = open_store(dest, dest_options)
    if source_store.uri_of(source_path) == dest_store.uri_of(dest_path):
        raise UsageError(f"{public_uri(source)}: source and destination are the same file")
    with source_store.open_reader(source_path) as reader:
        try:
            with one_clear_error(reader.uri):
                checkpoint, safety, state_dict = read_selected(reader, options)
                torch_plan = plan_torch_archive(state_dict, archive_root=checkpoint.archive_root)
            result = _write(
                torch_plan, reader, dest_store, dest_path, progress, check_source=options.verify != "none"
            )
        except CheckpointError:
            # An object that was replaced meanwhile looks damaged; say which of the two it is.
            reader.check_unchanged()
            raise
        manifest = _draft_manifest(reader, checkpoint, safety, state_dict, torch_plan, result, options)
        bytes_read = reader.bytes_read
    name = dest_path.rstrip("/").rsplit("/", 1)[-1]
    manifest["outputs"][0]["path"] = name
    for row in manifest["tensors"]:
        row["file"] = name
    manifest["run_id"] = run_id or os.urandom(6).hex()
    manifest["started_at"] = _iso(started)
    manifest["finished_at"] = utc_now()
    manifest["bytes_read"] = bytes_read
    manifest["bytes_written"] = torch_plan.plan.size
    records = tuple(_draft_record(record, result) for record in torch_plan.plan.records)
    return Draft(
        source, dest, options.verify, manifest, torch_plan.plan.size, result.crc32, records, options.limits
    )


def _draft_record(record: RecordLayout, result: SpliceResult) -> DraftRecord:
    crc = record.crc32 if record.slot is None else result.crcs[record.slot]
    assert crc is not None
    return DraftRecord(record.offset, record.nbytes, crc)


def _write(
    torch_plan: TorchPlan,
    reader: RangeReader,
    dest_store: Store,
    dest_path: str,
    progress: Progress | None,
    *,
    check_source: bool,
) -> SpliceResult:
    with dest_store.open_writer(dest_path, size_hint=torch_plan.plan.size) as writer:
        result = splice(torch_plan.plan, reader, writer, progress, check_source=check_source)
        reader.check_unchanged()
        # A manifest of an earlier output must not vouch for this one, not even for an instant.
        dest_store.delete(dest_path + MANIFEST_SUFFIX)
        writer.commit()
    return result


def commit(
    draft: Draft,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prove the draft's output at its level and write the manifest, which is returned.

    Raises:
        VerificationError: the stored output is not what the source says; it is removed.
    """
    store, path = open_store(draft.dest_uri, dest_options)
    manifest = draft.manifest
    try:
        if draft.level != "none":
            from ptbin.proof.output import prove_output

            prove_output(draft, store, path, source_options=source_options, progress=progress)
    except VerificationError:
        store.delete(path)
        raise
    manifest["verification"] = {
        "level": draft.level,
        "status": "not verified" if draft.level == "none" else "verified",
        "at": utc_now(),
    }
    store.write_bytes(path + MANIFEST_SUFFIX, dump_manifest(manifest))
    return manifest


def _draft_manifest(
    reader: RangeReader,
    checkpoint: Checkpoint,
    safety: SafetyReport,
    state_dict: StateDict,
    torch_plan: TorchPlan,
    result: SpliceResult,
    options: ConvertOptions,
) -> dict[str, Any]:
    identity: Identity = reader.identity
    return {
        "schema_version": SCHEMA_VERSION,
        "source": {
            "uri": reader.uri,
            "size": reader.size,
            "identity": identity.to_json(),
            "container": checkpoint.container,
        },
        "selected": state_dict.path,
        "options": options.to_json(),
        "options_fingerprint": options.fingerprint(),
        "outputs": [
            {"path": "", "size": torch_plan.plan.size, "sha256": None, "crc32": hex_crc32(result.crc32)}
        ],
        "tensors": _tensor_rows(torch_plan, state_dict, result),
        "left_out": [item.to_json() for item in state_dict.left_out],
        "globals": safety.to_json(),
        "safety": {"verdict": safety.verdict, "findings": list(safety.findings)},
        "verification": {},
        "tool": {"name": "ptbin", "version": __version__},
    }


def _tensor_rows(torch_plan: TorchPlan, state_dict: StateDict, result: SpliceResult) -> list[dict[str, Any]]:
    records = {r.key: r for r in torch_plan.plan.records}
    first_on: dict[str, str] = {}
    rows = []
    for planned in torch_plan.tensors:
        tensor, key = planned.tensor, planned.placed.storage.key
        record = records[key]
        owner = planned.name.split("#", 1)[0]
        row: dict[str, Any] = {
            "name": planned.name,
            "source_name": _source_name(state_dict, owner, planned.name),
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "nbytes": tensor.nbytes,
            "file": "",
            "offset": planned.offset,
            "sha256": None,
        }
        if _covers(planned, record.offset, record.nbytes):
            crc = (
                record.crc32
                if record.crc32 is not None
                else result.crcs.get(record.slot if record.slot is not None else -1)
            )
            row["crc32"] = hex_crc32(crc or 0)
        if not _is_contiguous(planned):
            row["stride"] = list(planned.placed.stride)
        if tensor.flags:
            row["lazy"] = list(tensor.flags)
        if record.nbytes and key in first_on:
            row["shares_with"] = first_on[key]
        if not record.source_checked:
            row["source_checked"] = False
        first_on.setdefault(key, planned.name)
        rows.append(row)
    return rows


def _source_name(state_dict: StateDict, owner: str, name: str) -> str:
    source = state_dict.source_names.get(owner)
    return name if source is None else source + name[len(owner) :]


def _is_contiguous(planned: PlannedTensor) -> bool:
    expected = 1
    for n, s in zip(reversed(planned.tensor.shape), reversed(planned.placed.stride), strict=True):
        if n != 1 and s != expected:
            return planned.tensor.numel == 0
        expected *= n
    return True


def _covers(planned: PlannedTensor, offset: int, nbytes: int) -> bool:
    return planned.offset == offset and planned.tensor.nbytes == nbytes and _is_contiguous(planned)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
