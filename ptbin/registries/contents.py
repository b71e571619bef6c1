"""What becomes of one version's files: a plan of jobs, as `ptbin.catalog` has them. Writes nothing.

Every checkpoint is looked into, so that a hostile or truncated one costs the destination nothing. Costs a
listing, and the index of each checkpoint. A dry run prints the plan, `transfer` carries it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ptbin.catalog.collisions import suffixes_beside
from ptbin.catalog.finding import find_checkpoints
from ptbin.catalog.jobs import Found, Job
from ptbin.catalog.planning import relative_output
from ptbin.errors import CheckpointError, NoStateDictError, NotACheckpointError, OutputCollisionError
from ptbin.manifests.manifest import MANIFEST_SUFFIX
from ptbin.manifests.provenance import STATEMENT_SUFFIX
from ptbin.options import ConvertOptions
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.selected import read_selected
from ptbin.registries.base import Pair
from ptbin.registries.layouts import Style
from ptbin.registries.record import OWN_FILES
from ptbin.sources.companions import is_sidecar
from ptbin.sources.leftovers import is_leftover, left_alone_as
from ptbin.sources.opening import SourcePlace, find_source
from ptbin.sources.part_names import INDEX_SUFFIX
from ptbin.sources.suffixes import suffix_of
from ptbin.stores import ListedObject, Place
from ptbin.values.names import is_plain_path
from ptbin.writing.formats import OUTPUT_SUFFIXES

WEIGHTS_SUFFIXES = frozenset(".pt .pth .ckpt .bin .th .safetensors .pt2 .pkl .pickle .jit .ptc".split())
"""A file of such a name that is not a checkpoint makes a version bad; other names are then plain files."""

OF_OTHERS = (".pkl", ".pickle")
"""A file that is called a pickle and nothing else may be scikit-learn's, say."""


class NoCheckpointError(NotACheckpointError):
    """A version without any checkpoint: of another framework, most likely."""

    reason = "no_checkpoint"


@dataclass(frozen=True, slots=True)
class Contents:
    """The plan of one version. The jobs' `dest_uri` are paths below the version's folder at DEST.

    Attributes:
        folder: where the version's files lie at SOURCE.
        jobs: conversions and then copies, each in the order of their paths.
        beside: files of the model that go into each version; the version's own come first.
        left: paths of files that stay behind: pickles of training that hold no weights, and weights that
            are there twice.
    """

    folder: Place
    jobs: tuple[Job, ...]
    beside: tuple[Pair, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def conversions(self) -> list[Job]:
        return [job for job in self.jobs if not job.copies]

    @property
    def copies(self) -> list[Job]:
        return [job for job in self.jobs if job.copies]

    def source_of(self, job: Job) -> Place:
        """Where the job's file, or folder, lies."""
        return self.folder if job.source_uri == self.folder.uri else self.folder / job.path

    def files(self, options: ConvertOptions) -> list[str]:
        """Paths at DEST of what is written; of shards and split checkpoints the name that they share."""
        found = [job.dest_uri for job in self.copies]
        for job in self.conversions:
            found += [job.dest_uri + suffix for suffix in ("", *suffixes_beside(options), MANIFEST_SUFFIX)]
        return sorted(found) + [path for _, path in self.beside]

    def with_beside(self, pairs: Sequence[Pair]) -> tuple[Pair, ...]:
        """Of files from elsewhere those that take no place of the version's own."""
        taken = {job.dest_uri.casefold() for job in self.copies}
        for job in self.conversions:
            suffixes = ("", MANIFEST_SUFFIX, STATEMENT_SUFFIX, INDEX_SUFFIX)
            taken |= {f"{job.dest_uri}{suffix}".casefold() for suffix in suffixes}
        return tuple(
            (uri, path) for uri, path in pairs if is_plain_path(path) and path.casefold() not in taken
        )


def plan_contents(folder: Place, style: Style, options: ConvertOptions) -> Contents:
    """List a version's files and open the index of each checkpoint among them.

    Raises:
        CheckpointError: the first one that cannot be converted, and why.
        NoCheckpointError: there is none.
        OutputCollisionError: two files would be one there.
    """
    root = folder.file
    listed = {item.path: item for item in root.iter_objects() if not _is_own(item.path)}
    # What an earlier conversion stated of a file does not hold for what is made of it now.
    for path in [path for path in listed if path.endswith(STATEMENT_SUFFIX)]:
        if path.removesuffix(STATEMENT_SUFFIX) in listed:
            del listed[path]
    found: list[Found] = []
    twins = _twins(listed, options)
    members: set[str] = set()
    left = {path for path, fate in twins.items() if fate == "left"}
    others = {"is_other": lambda item: is_sidecar(item.path), "parts": options.parts}
    for candidate in find_checkpoints(root, **others):  # type: ignore[arg-type]
        if candidate.path in twins:
            continue
        source = find_source(root if candidate.uri == root.uri else root / candidate.path)
        source.refuse_part(parts=options.parts)
        taken = _is_taken(candidate, source, options)
        if taken is None:
            left.add(candidate.path)
        elif taken:
            found.append(candidate)
            members |= {(source.folder / part.path).relative_to(root) for part in source.parts} or {
                candidate.path
            }
    if not found:
        raise NoCheckpointError(f"{root.uri}: no checkpoint among its {len(listed)} files")
    copied = [item for path, item in sorted(listed.items()) if path not in members | left]
    jobs = tuple(_jobs(found, copied, style, OUTPUT_SUFFIXES[options.format]))
    _refuse_collisions([job.dest_uri for job in jobs], root.uri)
    return Contents(root, jobs, left=tuple(sorted(left)))


def _is_taken(candidate: Found, source: SourcePlace, options: ConvertOptions) -> bool | None:
    """Whether a candidate is converted; None: it stays behind. Raises where it should be, and cannot."""
    with source.open() as reader:
        try:
            with as_checkpoint_errors(reader.uri):
                read_selected(reader, options)
        except NotACheckpointError:
            if candidate.certain and suffix_of(candidate.path) in WEIGHTS_SUFFIXES:
                raise
            return False
        except CheckpointError as error:
            no_model = isinstance(error, NoStateDictError)
            if left_alone_as(candidate.path, error) or (no_model and is_of_training(candidate.path)):
                return None
            if candidate.certain or not no_model:
                raise
            return False
    return True


def _jobs(found: Sequence[Found], copied: Sequence[ListedObject], style: Style, suffix: str) -> Iterator[Job]:
    alone = len(found) == 1
    # What lies next to the only checkpoint stays next to it.
    folder = found[0].path.rpartition("/")[0] if alone and style != "mirror" else ""
    for one in found:
        output = _output(one.path, style, suffix, alone=alone)
        yield Job(one.uri, one.size, output, one.path, True, one.identity)
    for item in copied:
        output = item.path.removeprefix(f"{folder}/") if folder else item.path
        yield Job(item.uri, item.size, output, item.path, True, item.identity, copies=True)


def is_of_training(path: str) -> bool:
    """Whether a pickle without weights is what trainers leave next to weights, and not a missed model."""
    name = path.rpartition("/")[2]
    return is_leftover(name) or name.endswith(OF_OTHERS)


def _twins(listed: Mapping[str, ListedObject], options: ConvertOptions) -> dict[str, str]:
    """Weights that lie there twice, as `pytorch_model.bin` and `model.safetensors`: which is not converted.

    The safetensors go along as they are (`along`); where safetensors are asked for they are the source, and
    the pickle stays behind (`left`).
    """
    found = {}
    for path in listed:
        folder, slash, name = path.rpartition("/")
        other = f"{folder}{slash}model.safetensors"
        if name == "pytorch_model.bin" and other in listed:
            safe = options.format == "safetensors"
            found[path if safe else other] = "left" if safe else "along"
    return found


def _output(path: str, style: Style, suffix: str, *, alone: bool) -> str:
    if alone and style == "hf":
        return relative_output(path.rpartition("/")[2], "replace", suffix, "hf").rpartition("/")[2]
    if alone and style == "triton":
        return f"model{suffix}"
    return relative_output(path, "replace", suffix, "hf" if style == "hf" else "mirror")


def _is_own(path: str) -> bool:
    name = path.rpartition("/")[2]
    # A signature of what lies there does not hold for what is made of it.
    if name == "model.sig" or path == ".gitattributes":
        return True
    return path.endswith(MANIFEST_SUFFIX) or name in OWN_FILES or "_ptbin" in path.split("/")


def _refuse_collisions(outputs: Sequence[str], uri: str) -> None:
    seen: set[str] = set()
    for output in outputs:
        if not is_plain_path(output):
            raise OutputCollisionError(f"{uri}: {output!r} is not a plain relative path")
        if output.casefold() in seen:
            raise OutputCollisionError(f"{uri}: two of its files would both be {output}")
        seen.add(output.casefold())
