"""One checkpoint to one output: read, select, plan, splice, prove, and only then the manifest.

`stage` writes the output and returns a `Draft`; the output does not count yet. `commit` proves it and
writes the manifest. The two halves may run in different processes; a draft is one string. `convert` is
both. Killed at any instant, what remains is either nothing, an output without a manifest, or both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ptbin.errors import ChecksumMismatchError, VerificationError
from ptbin.installed import require_reader
from ptbin.manifests.claims import claim_of, claim_place, end_claim, is_restored
from ptbin.manifests.draft import Draft, DraftFile
from ptbin.manifests.drafting import Written, draft_manifest
from ptbin.manifests.manifest import MANIFEST_SUFFIX, dump_manifest, utc_now
from ptbin.manifests.provenance import STATEMENT_SUFFIX, add_source_digests, dump_statement, statement_of
from ptbin.manifests.sidecars import copy_sidecars, put_text
from ptbin.manifests.vouching import Guard, Standing
from ptbin.options import ConvertOptions, given
from ptbin.output_files import write_files
from ptbin.preparing import outputs_of_before, prepared
from ptbin.reading.pickle.gc_pause import gc_paused
from ptbin.stores import Identity, Place, place_of
from ptbin.stores.place import Where
from ptbin.values.crc32 import crc32_of

Progress = Callable[[int], None]


def convert(
    source: Where,
    dest: Where,
    options: ConvertOptions | None = None,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert one checkpoint and return its manifest.

    Args:
        source: local path or fsspec URL of one checkpoint, or a `Place`.
        dest: where the output goes; its manifest goes next to it.
        source_options: fsspec storage options for `source`, if it is text; they never reach manifests or
            messages.
        dest_options: the same for `dest`.
        progress: called with the bytes moved since its last call.

    Raises:
        OutputExistsError: a file is there that no manifest vouches for, and `options.force` is not set.
        CheckpointError: the checkpoint is damaged, unsafe, or has no single state dict.
        VerificationError: what was stored is not what the source says; the output is removed.
        StorageError: a store failed. UsageError: the call is wrong.
    """
    source, dest = place_of(source, source_options), place_of(dest, dest_options)
    draft = stage(source, dest, options, run_id=run_id, progress=progress)
    return publish_at(draft, source, dest, progress).manifest


def stage(
    source: Where,
    dest: Where,
    options: ConvertOptions | None = None,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
    guard: Guard | None = "any",
    standing: Standing | None = None,
) -> Draft:
    """Write the output, without its manifest. Arguments and errors as `convert`.

    Args:
        guard: which manifests vouch for what is there already (`vouching`); None: it is replaced.
        standing: what a listing has shown at `dest`; spares requests.
    """
    options = given(options, ConvertOptions)
    if options.verify == "load":
        require_reader(options.format)
    started_at = utc_now()
    written: list[Written] = []
    files: list[DraftFile] = []
    notes: list[str] = []
    begin, end = place_of(source, source_options), place_of(dest, dest_options)
    with prepared(begin, end, options, guard, standing) as made:
        reader, at, output = made.reader, made.at, made.output
        notes += made.selected.notes
        obsolete = outputs_of_before(at.manifest, made.name)
        for one, file in write_files(output.files, reader, at, options, progress, notes):
            written.append(one)
            files.append(file)
        files += [put_text(at, name, data) for name, data in output.texts]
        files += copy_sidecars(made.sidecars, made.source, at, dtype=options.dtype, notes=notes)
        with gc_paused():
            manifest = draft_manifest(reader, made.selected, output, written, files)
        if part := made.source.incomplete or made.selected.checkpoint.part:
            manifest["part"] = part
        if options.provenance:
            add_source_digests(manifest["source"], made.source, reader, progress)
            manifest["provenance"] = made.name + STATEMENT_SUFFIX
            obsolete.discard(manifest["provenance"])
        bytes_read = reader.bytes_read
    for name in sorted(obsolete - {file.path for file in files}):
        kept = made.why_kept(name)
        if kept:
            notes.append(f"{name} of the output before this one stays: {kept}")
        else:
            at.place_of(name).delete()
    manifest["run_id"] = run_id or os.urandom(6).hex()
    manifest["started_at"] = started_at
    manifest["finished_at"] = utc_now()
    manifest["bytes_read"] = bytes_read
    manifest["bytes_written"] = sum(file.size for file in files)
    manifest["bytes_copied_in_store"] = sum(file.copied_nbytes for file in files)
    if notes:
        manifest["notes"] = notes
    return Draft(
        str(source),
        str(dest),
        options.verify,
        manifest,
        tuple(files),
        options.limits,
        options.file_digest,
        claimed=at.has_claim,
        claim=at.claim,
    )


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
    """As `commit`, with the identity of the stored manifest, for an index of finished work."""
    source, dest = place_of(draft.source_uri, source_options), place_of(draft.dest_uri, dest_options)
    return publish_at(draft, source, dest, progress)


def publish_at(draft: Draft, source: Place, dest: Place, progress: Progress | None) -> Published:
    """As `publish`, of a draft that was just staged between these places."""
    manifest = draft.manifest
    proven_by: str | None = None
    identities = {file.path: file.identity for file in draft.files if file.identity is not None}
    try:
        if draft.level != "none":
            from ptbin.proof.output import prove_output

            proven_by = prove_output(draft, source, dest, progress=progress, identities=identities)
    except (VerificationError, ChecksumMismatchError):
        for file in draft.files:
            (dest.parent / file.path).delete()
        if draft.claimed:
            end_claim(dest)
        raise
    manifest["verification"] = {
        "level": draft.level,
        "status": "not verified" if draft.level == "none" else "verified",
        "at": utc_now(),
    }
    if proven_by is not None:
        manifest["verification"]["proven_by"] = proven_by
    if identities:
        manifest["verification"]["identities"] = identities
    if "provenance" in manifest:
        statement = dump_statement(statement_of(manifest))
        if draft.claimed:
            files = [(file.path, file.size, file.crc32) for file in draft.files]
            files.append((manifest["provenance"], len(statement), crc32_of(statement)))
            claim_place(dest).write_bytes(claim_of(files, restored=is_restored(manifest)))
        dest.beside(STATEMENT_SUFFIX).write_bytes(statement, claim=draft.claim)
    place = dest.beside(MANIFEST_SUFFIX)
    identity = place.write_bytes(dump_manifest(manifest))
    if draft.claimed:
        end_claim(dest)
    return Published(manifest, identity or place.stat().identity)
