"""One checkpoint to one output: read, select, plan, splice, prove, and only then the manifest.

`stage` writes the output and returns a `Draft`; the output does not count yet. `commit` proves it and
writes the manifest. The two halves may run in different processes; a draft is one string. `convert` is
both. Killed at any instant, what remains is either nothing, an output without a manifest, or both.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ptbin.draft import Draft, DraftFile
from ptbin.drafting import Written, draft_file, draft_manifest, stored_of
from ptbin.errors import (
    CheckpointError,
    ChecksumMismatchError,
    UsageError,
    VerificationError,
)
from ptbin.manifest import MANIFEST_SUFFIX, dump_manifest, utc_now
from ptbin.options import ConvertOptions
from ptbin.proof.digests import FileDigests
from ptbin.provenance import STATEMENT_SUFFIX, add_source_digests, dump_statement, statement_of
from ptbin.reading.checkpoint import one_clear_error
from ptbin.reading.selected import read_selected
from ptbin.segments import FilePlan
from ptbin.sidecars import copy_sidecars
from ptbin.sources import find_source
from ptbin.splice import SpliceResult, check_copies, splice
from ptbin.stores import CopyRefused, Identity, RangeReader, Store, open_store, public_uri
from ptbin.ties import tie_equal_tensors
from ptbin.vouching import ASIDE_SUFFIX, Guard, Place
from ptbin.writing.outputs import plan_outputs

if TYPE_CHECKING:
    from ptbin.proof.output import WrittenProof

__all__ = ["Progress", "Published", "commit", "convert", "publish", "stage"]

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
        OutputExistsError: a file is there that no manifest vouches for, and `options.force` is not set.
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
        guard="any",
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
    guard: Guard | None = None,
    is_free: bool = False,
) -> Draft:
    """Write the output, without its manifest. Arguments and errors as `convert`.

    Args:
        guard: which manifests vouch for what is there already (`vouching`); None: it is replaced.
        is_free: nothing is there, as a listing has shown; spares a request.
    """
    options = options or ConvertOptions()
    started = time.time()
    place = find_source(source, source_options)
    place.refuse_part(parts=options.parts)
    dest_store, dest_path = open_store(dest, dest_options)
    if place.store.uri_of(place.path) == dest_store.uri_of(dest_path):
        raise UsageError(f"{public_uri(source)}: source and destination are the same file")
    folder, _, name = dest_path.rstrip("/").rpartition("/")
    written: list[Written] = []
    files: list[DraftFile] = []
    with place.open() as reader:
        try:
            with one_clear_error(reader.uri):
                selected = read_selected(reader, options)
                if options.tie_by_value:
                    for state_dict in selected.state_dicts:
                        tie_equal_tensors(state_dict, reader)
                    selected.account()
                output = plan_outputs(
                    selected.state_dicts, options, name, archive_root=selected.checkpoint.archive_root
                )
            if options.split:
                # A listing speaks of the names that were planned; another split may have taken one since.
                is_free = False
            place_at = Place(dest_store, dest_path, None if options.force else guard, is_free=is_free)
            obsolete = _outputs_of_before(place_at.manifest, name)
            for plan in output.files:
                place_at.check(plan.name, plan.plan.size)
            check_source = options.verify != "none"
            notes: list[str] = []
            for plan in output.files:
                writing = _Writing(plan, reader, dest_store, folder, place_at, progress)
                result, file, digests = writing.run(
                    check_source=check_source, replaces=bool(obsolete), notes=notes
                )
                written.append((plan, result, digests))
                files.append(file)
        except CheckpointError:
            # An object that was replaced meanwhile looks damaged; say which of the two it is.
            reader.check_unchanged()
            raise
        for text_name, data in output.texts:
            place_at.check(text_name, len(data), zlib.crc32(data))
            dest_store.write_bytes(f"{folder}/{text_name}", data)
            files.append(DraftFile(text_name, len(data), zlib.crc32(data)))
        if options.layout == "hf":
            files.extend(
                copy_sidecars(place, dest_store, folder, place_at.check, dtype=options.dtype, notes=notes)
            )
        manifest = draft_manifest(reader, selected, output, written, files)
        if part := place.incomplete or selected.checkpoint.part:
            manifest["part"] = part
        if options.provenance:
            add_source_digests(manifest["source"], place, reader, progress)
            manifest["provenance"] = name + STATEMENT_SUFFIX
        bytes_read = reader.bytes_read
    for path in obsolete - {file.path for file in files}:
        dest_store.delete(f"{folder}/{path}")
    manifest["run_id"] = run_id or os.urandom(6).hex()
    manifest["started_at"] = _iso(started)
    manifest["finished_at"] = utc_now()
    manifest["bytes_read"] = bytes_read
    manifest["bytes_written"] = sum(file.size for file in files)
    manifest["bytes_copied_in_store"] = sum(file.copied_nbytes for file in files)
    if notes:
        manifest["notes"] = notes
    return Draft(
        source, dest, options.verify, manifest, tuple(files), options.limits, replaces=place_at.has_aside
    )


@dataclass(frozen=True, slots=True)
class _Writing:
    """One output file being written."""

    plan: FilePlan
    reader: RangeReader
    store: Store
    folder: str
    place: Place
    progress: Progress | None

    def run(
        self, *, check_source: bool, replaces: bool, notes: list[str]
    ) -> tuple[SpliceResult, DraftFile, FileDigests | None]:
        """What came of it, what the file must be, and its digests where it was proven under no name yet.

        Where it refuses to, everything is streamed through this process instead and `notes` says why.
        """
        try:
            return self._once(check_source, replaces, copies=True)
        except CopyRefused as refusal:
            notes.append(f"streamed, because the store did not copy: {refusal}")
            return self._once(check_source, replaces, copies=False)

    def _once(
        self, check_source: bool, replaces: bool, *, copies: bool
    ) -> tuple[SpliceResult, DraftFile, FileDigests | None]:
        plan = self.plan
        path = f"{self.folder}/{plan.name}"
        with self.store.open_writer(path, size_hint=plan.plan.size, copies=copies) as writer:
            descriptor = writer.written() if check_source else None
            proof = self._proof(descriptor) if descriptor is not None else None
            try:
                if proof is not None:
                    writer.reached = proof.reached
                result = splice(
                    plan.plan,
                    self.reader,
                    writer,
                    self.progress,
                    check_source=check_source,
                    # A local file is proven before it gets its name, which shows a damaged source as well.
                    check_moved=proof is None,
                    # What a store copied is read when the output is proven. Before that only where a good
                    # output stands in its place: a damaged source must not replace it.
                    check_copied=check_source and replaces,
                )
                writer.settle()
                self.reader.confirm()
                file = draft_file(plan, result, writer.bytes_copied)
                digests = self._proven(proof, file) if proof is not None else None
            except BaseException:
                if proof is not None:
                    proof.give_up()
                raise
            self.place.check(plan.name, plan.plan.size, result.crc32)
            self.place.withdraw_manifest()
            writer.expected_crc32 = result.crc32
            writer.commit()
        if digests is not None and writer.identity is not None:
            file = replace(file, sha256=digests.sha256, identity=writer.identity.value)
        return result, file, digests

    def _proof(self, descriptor: int) -> WrittenProof:
        from ptbin.proof.output import WrittenProof

        tensors = [(planned.name, stored_of(planned)) for planned in self.plan.tensors]
        return WrittenProof(descriptor, self.plan.plan, tensors, self.store.uri_of(self.place.path))

    def _proven(self, proof: WrittenProof, file: DraftFile) -> FileDigests:
        try:
            return proof.finish(file, self.progress)
        except VerificationError:
            # The source's own bytes may be what is wrong: then that is the answer.
            check_copies(self.plan.plan, self.reader)
            raise


def _outputs_of_before(manifest: Mapping[str, Any] | None, name: str) -> set[str]:
    """Names of the files that an earlier manifest of this output lists: shards of another count, say."""
    if manifest is None:
        return set()
    found = {output["path"] for output in manifest["outputs"]}
    if "provenance" in manifest:
        found.add(name + STATEMENT_SUFFIX)
    return found


@dataclass(frozen=True, slots=True)
class Published:
    """A finished output: its manifest, and which state of the stored manifest that is."""

    manifest: dict[str, Any]
    identity: Identity


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
        ChecksumMismatchError: the same of what the store copied by itself: the source itself is damaged.
    """
    return publish(
        draft, source_options=source_options, dest_options=dest_options, progress=progress
    ).manifest


def publish(
    draft: Draft,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Published:
    """As `commit`, for those who keep an index of what is finished."""
    store, path = open_store(draft.dest_uri, dest_options)
    manifest = draft.manifest
    proven_by: str | None = None
    try:
        if draft.level != "none":
            from ptbin.proof.output import prove_output

            proven_by = prove_output(draft, store, path, source_options=source_options, progress=progress)
    except (VerificationError, ChecksumMismatchError):
        folder = path.rpartition("/")[0]
        for file in draft.files:
            store.delete(f"{folder}/{file.path}")
        if draft.replaces:
            store.delete(path + ASIDE_SUFFIX)
        raise
    manifest["verification"] = {
        "level": draft.level,
        "status": "not verified" if draft.level == "none" else "verified",
        "at": utc_now(),
    }
    if proven_by is not None:
        manifest["verification"]["proven_by"] = proven_by
    if "provenance" in manifest:
        store.write_bytes(path + STATEMENT_SUFFIX, dump_statement(statement_of(manifest)))
    identity = store.write_bytes(path + MANIFEST_SUFFIX, dump_manifest(manifest))
    if draft.replaces:
        store.delete(path + ASIDE_SUFFIX)
    return Published(manifest, identity or store.stat(path + MANIFEST_SUFFIX).identity)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
