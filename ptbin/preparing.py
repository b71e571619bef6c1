"""A conversion before its first byte is written: what it takes, what it makes, and whether it may.

`prepared` is what a conversion begins with, and all of it that a dry run does (`preview`). Reads the source's
index; writes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ptbin.errors import CheckpointError, UsageError
from ptbin.manifests.manifest import MANIFEST_SUFFIX
from ptbin.manifests.provenance import STATEMENT_SUFFIX
from ptbin.manifests.vouching import Guard, OutputSite, Standing
from ptbin.options import ConvertOptions, given
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.selected import Selected, read_selected
from ptbin.sources.opening import SourcePlace, find_source
from ptbin.sources.output_names import is_named_after
from ptbin.sources.sidecars import find_sidecars, refuse_pointer_at
from ptbin.splice import iter_recipe, splice
from ptbin.stores import ListedObject, Place, RangeReader, Writer
from ptbin.values.crc32 import crc32_of
from ptbin.values.names import bad_name, shown_path
from ptbin.writing.outputs import OutputPlan, plan_outputs
from ptbin.writing.ties import tie_equal_tensors


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
    options = given(options, ConvertOptions)
    with prepared(source, dest, options, guard, standing, damaged) as made:
        for plan in made.output.files:
            if made.at.replaced.get(plan.name):
                with _DiscardingWriter(plan.name) as writer:
                    result = splice(plan.plan, made.reader, writer, None)
                made.at.check(plan.name, plan.plan.size, result.crc32)
        names = [plan.name for plan in made.output.files]
        names += [name for name, _ in made.output.texts]
        names += made.sidecars
        names += [made.name + STATEMENT_SUFFIX] if options.provenance else []
        before = outputs_of_before(made.at.manifest, made.name)
        return Preview(
            (*names, made.name + MANIFEST_SUFFIX),
            tuple(sorted(made.at.replaced)),
            tuple(name for name in sorted(before - set(names)) if not made.why_kept(name)),
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A conversion before its first byte is written: all that it takes, and a place that it may use."""

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

    def why_kept(self, name: str) -> str:
        """Why a file that the earlier manifest lists may not be deleted; empty where it may.

        A manifest may be anybody's, and list anybody's files with their digests.
        """
        if name == self.name + STATEMENT_SUFFIX:
            return "" if self.at.has_own_statement() else "it is not the statement of that output"
        if not is_named_after(name, self.name):
            return "it is not named after it"
        if not self.at.vouches_for(name):
            return "it has other content by now"
        return "it has a manifest of its own" if self.at.has_manifest_beside(name) else ""


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
        selected.state_dicts,
        name,
        format_name=options.format,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        archive_root=selected.checkpoint.archive_root,
    )


@contextlib.contextmanager
def prepared(
    source: Place,
    dest: Place,
    options: ConvertOptions,
    guard: Guard | None,
    standing: Standing | None,
    damaged: Mapping[str, Any] | None = None,
) -> Iterator[Prepared]:
    """Read the source's index, plan the output, and check every place that it needs."""
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
                at.check(text_name, len(data), crc32_of(data))
            for sidecar, item in sidecars.items():
                refuse_pointer_at(found.folder / item.path, item.size)
                if sidecar != "config.json" or options.dtype is None:  # which then gets another size
                    at.check(sidecar, item.size)
            if options.provenance:
                at.check_statement()
            yield Prepared(found, reader, selected, output, sidecars, at)
        except CheckpointError:
            # An object that was replaced meanwhile looks damaged; say which of the two it is.
            reader.check_unchanged()
            raise


def _refuse_same_file(source: Place, dest: Place) -> None:
    uris = source.uri, dest.uri
    if source.is_local and dest.is_local:
        # With the links in their folders followed.
        uris = os.path.realpath(source.path), os.path.join(os.path.realpath(dest.parent.path), dest.name)
    if uris[0] == uris[1]:
        raise UsageError(f"{source.uri}: source and destination are the same file")


class _DiscardingWriter(Writer):
    """Takes an output and keeps nothing of it."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.bytes_written += len(data)

    def _publish(self) -> None: ...

    def _discard(self) -> None: ...


def outputs_of_before(manifest: Mapping[str, Any] | None, name: str) -> set[str]:
    """Names of the files that an earlier manifest of this output lists: shards of another count, say."""
    if manifest is None:
        return set()
    found = {output["path"] for output in manifest["outputs"]}
    if "provenance" in manifest:
        found.add(name + STATEMENT_SUFFIX)
    return found
