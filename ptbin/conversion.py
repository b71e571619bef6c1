"""One checkpoint to one output: read, select, plan, splice, prove, and only then the manifest.

`stage` writes the output and returns a `Draft`; the output does not count yet. `commit` proves it and
writes the manifest. The two halves may run in different processes; a draft is one string. `convert` is
both. Killed at any instant, what remains is either nothing, an output without a manifest, or both.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptbin.errors import (
    CheckpointError,
    ChecksumMismatchError,
    UsageError,
    VerificationError,
)
from ptbin.installed import require_reader
from ptbin.manifests.draft import Draft, DraftFile
from ptbin.manifests.drafting import Written, draft_manifest
from ptbin.manifests.manifest import MANIFEST_SUFFIX, dump_manifest, utc_now
from ptbin.manifests.provenance import STATEMENT_SUFFIX, add_source_digests, dump_statement, statement_of
from ptbin.manifests.sidecars import copy_sidecars, put_text
from ptbin.manifests.vouching import (
    Guard,
    OutputSite,
    Standing,
    claim_of,
    claim_place,
    end_claim,
    is_restored,
)
from ptbin.options import ConvertOptions
from ptbin.output_files import write_files
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.selected import Selected, read_selected
from ptbin.sources.opening import SourcePlace, find_source
from ptbin.sources.pointers import refuse_pointer_at
from ptbin.sources.sidecars import find_sidecars
from ptbin.splice import iter_recipe, splice
from ptbin.stores import (
    Identity,
    ListedObject,
    Place,
    RangeReader,
    Writer,
    place_of,
)
from ptbin.values.names import bad_name, shown_path
from ptbin.writing.outputs import OutputPlan, plan_outputs
from ptbin.writing.ties import tie_equal_tensors

if TYPE_CHECKING:
    from ptbin.stores.place import Where

__all__ = [
    "Preview",
    "Progress",
    "Published",
    "commit",
    "convert",
    "preview",
    "publish",
    "publish_at",
    "stage",
]

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
        source_options, dest_options: fsspec storage options, where places are given as text; they never reach
            manifests or messages.
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
    options = options or ConvertOptions()
    if options.verify == "load":
        require_reader(options.format)
    started_at = utc_now()
    written: list[Written] = []
    files: list[DraftFile] = []
    notes: list[str] = []
    begin, end = place_of(source, source_options), place_of(dest, dest_options)
    with _prepared(begin, end, options, guard, standing) as made:
        reader, at, output = made.reader, made.at, made.output
        obsolete = _outputs_of_before(at.manifest, made.name)
        for one, file in write_files(output.files, reader, at, options, progress, notes):
            written.append(one)
            files.append(file)
        files += [put_text(at, name, data) for name, data in output.texts]
        files += copy_sidecars(made.sidecars, made.source, at, dtype=options.dtype, notes=notes)
        manifest = draft_manifest(reader, made.selected, output, written, files)
        if part := made.source.incomplete or made.selected.checkpoint.part:
            manifest["part"] = part
        if options.provenance:
            add_source_digests(manifest["source"], made.source, reader, progress)
            manifest["provenance"] = made.name + STATEMENT_SUFFIX
            obsolete.discard(manifest["provenance"])
        bytes_read = reader.bytes_read
    for name in sorted(obsolete - {file.path for file in files}):
        if made.vouches_for(name):
            at.place_of(name).delete()
        else:
            notes.append(f"{name} of the output before this one stays: it has other content by now")
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
class Preview:
    """What a conversion would do to the files at its place: names next to the output.

    Attributes:
        writes: all that it would write, its manifest included.
        replaces: the files that it would write over, the manifest aside.
        removes: files of the output before, which this one does not have.
    """

    writes: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()


def preview(
    source: Place,
    dest: Place,
    options: ConvertOptions | None = None,
    *,
    guard: Guard | None = "any",
    standing: Standing | None = None,
    damaged: Mapping[str, Any] | None = None,
) -> Preview:
    """What `stage` and `publish` would do, found as they find it. Writes nothing.

    Reads the source's index, and its weights where a file that nothing vouches for may hold them already.
    `damaged`: what the run would have noted in the manifest by then (`manifests.damage`).

    Raises:
        OutputExistsError: it would refuse to. CheckpointError: it would refuse the source.
    """
    options = options or ConvertOptions()
    with _prepared(source, dest, options, guard, standing, damaged) as made:
        for plan in made.output.files:
            if made.at.replaced.get(plan.name):
                with _DiscardingWriter(plan.name) as writer:
                    result = splice(plan.plan, made.reader, writer, None)
                made.at.check(plan.name, plan.plan.size, result.crc32)
        names = [plan.name for plan in made.output.files]
        names += [name for name, _ in made.output.texts]
        names += made.sidecars
        names += [made.name + STATEMENT_SUFFIX] if options.provenance else []
        before = _outputs_of_before(made.at.manifest, made.name)
        return Preview(
            (*names, made.name + MANIFEST_SUFFIX),
            tuple(sorted(made.at.replaced)),
            tuple(name for name in sorted(before - set(names)) if made.vouches_for(name)),
        )


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A conversion before its first byte is written: all that it takes, and a place that may be had."""

    source: SourcePlace
    reader: RangeReader
    selected: Selected
    output: OutputPlan
    sidecars: dict[str, ListedObject]
    at: OutputSite

    @property
    def name(self) -> str:
        """Of the output."""
        return self.at.place.name

    def vouches_for(self, name: str) -> bool:
        """Whether a file that the earlier manifest speaks of is there as it was written."""
        return name == self.name + STATEMENT_SUFFIX or self.at.vouches_for(name)


def plan_conversion(reader: RangeReader, options: ConvertOptions, name: str) -> tuple[Selected, OutputPlan]:
    """What a conversion takes of a checkpoint, and the files that it makes of it. Writes nothing.

    Reads the index; with `tie_by_value` also the tensors that resemble another.
    """
    selected = read_selected(reader, options)
    if options.tie_by_value:
        for state_dict in selected.state_dicts:
            tie_equal_tensors(state_dict, lambda recipe: iter_recipe(recipe, reader, {}))
        selected.account()
    return selected, plan_outputs(
        selected.state_dicts, options, name, archive_root=selected.checkpoint.archive_root
    )


@contextlib.contextmanager
def _prepared(
    source: Place,
    dest: Place,
    options: ConvertOptions,
    guard: Guard | None,
    standing: Standing | None,
    damaged: Mapping[str, Any] | None = None,
) -> Iterator[_Prepared]:
    """Read the source's index, plan the output, and look at every place that it takes."""
    if why := bad_name(dest.name):
        raise UsageError(f"{shown_path(str(dest))!a}: the name {why}; choose another for the output")
    found = find_source(source)
    found.refuse_part(parts=options.parts)
    _refuse_same_file(found.place, dest)
    with found.open() as reader:
        try:
            with as_checkpoint_errors(reader.uri):
                selected, output = plan_conversion(reader, options, dest.name)
            # A listing speaks of the names that were planned; another split may have taken one since.
            known = standing if not options.split else None
            at = OutputSite(
                dest,
                None if options.force else guard,
                standing=known,
                restores=guard == "restored",
                source_uri=found.place.uri,
                damaged=damaged,
            )
            sidecars = find_sidecars(found) if options.layout == "hf" else {}
            for plan in output.files:
                at.check(plan.name, plan.plan.size)
            for text_name, data in output.texts:
                at.check(text_name, len(data), zlib.crc32(data))
            for sidecar, item in sidecars.items():
                refuse_pointer_at(found.folder / item.path, item.size)
                if sidecar != "config.json" or options.dtype is None:  # which then gets another size
                    at.check(sidecar, item.size)
            if options.provenance:
                at.check_statement()
            yield _Prepared(found, reader, selected, output, sidecars, at)
        except CheckpointError:
            # An object that was replaced meanwhile looks damaged; say which of the two it is.
            reader.check_unchanged()
            raise


def _refuse_same_file(source: Place, dest: Place) -> None:
    uris = source.uri, dest.uri
    if source.is_local and dest.is_local:
        # By whatever links their folders are reached.
        uris = os.path.realpath(source.path), os.path.join(os.path.realpath(dest.parent.path), dest.name)
    if uris[0] == uris[1]:
        raise UsageError(f"{source.uri}: source and destination are the same file")


class _DiscardingWriter(Writer):
    """Takes an output and keeps nothing of it."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.bytes_written += len(data)

    def _publish(self) -> None: ...

    def _discard(self) -> None: ...


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
            files.append((manifest["provenance"], len(statement), zlib.crc32(statement)))
            claim_place(dest).write_bytes(claim_of(files, restored=is_restored(manifest)))
        dest.beside(STATEMENT_SUFFIX).write_bytes(statement, claim=draft.claim)
    place = dest.beside(MANIFEST_SUFFIX)
    identity = place.write_bytes(dump_manifest(manifest))
    if draft.claimed:
        end_claim(dest)
    return Published(manifest, identity or place.stat().identity)
