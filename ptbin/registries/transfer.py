"""The files of one version from registry to registry: checkpoints as weights, everything else as it is.

`examine` lists and looks into every checkpoint before anything is written, so that a hostile or truncated one
costs the destination nothing. `transfer` converts, proves and copies; whether the version then counts is for
the registry to say. Done twice, it finds its own work and goes on from there.
"""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ptbin.catalog.finding import find_checkpoints
from ptbin.catalog.finished import is_up_to_date
from ptbin.catalog.jobs import Job
from ptbin.catalog.planning import relative_output
from ptbin.catalog.suffixes import OUTPUT_SUFFIXES, suffix_of
from ptbin.conversion import Published, publish, stage
from ptbin.errors import CheckpointError, NoStateDictError, NotACheckpointError, OutputCollisionError
from ptbin.manifests.manifest import MANIFEST_SUFFIX, parse_manifest
from ptbin.manifests.provenance import STATEMENT_SUFFIX
from ptbin.options import ConvertOptions
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.selected import read_selected
from ptbin.registries.base import Folder
from ptbin.registries.layouts import Style
from ptbin.registries.record import OWN_FILES, is_plain_path
from ptbin.sources.companions import companion_of, left_alone_as
from ptbin.sources.opening import find_source
from ptbin.sources.pointers import refuse_pointer
from ptbin.sources.sidecars import PATTERNS, change_of
from ptbin.stores import place_of
from ptbin.stores.copying import copy_file

__all__ = [
    "Contents",
    "NoCheckpointError",
    "Transferred",
    "examine",
    "files_of",
    "is_of_training",
    "own_first",
    "scratch",
    "transfer",
]

WEIGHTS_SUFFIXES = frozenset(".pt .pth .ckpt .bin .th .safetensors .pt2 .pkl .pickle .jit .ptc".split())
"""What is called so and is no checkpoint makes a version bad; other names are then files like any other."""

OF_OTHERS = (".pkl", ".pickle")
"""What is called a pickle and nothing else may be of scikit-learn, say."""

Progress = Callable[[int], None]


class NoCheckpointError(NotACheckpointError):
    """A version without any checkpoint: of another framework, most likely."""

    reason = "no_checkpoint"


@dataclass(frozen=True, slots=True)
class Contents:
    """What a version holds.

    Attributes:
        checkpoints: (path, URI, path of its output) of each.
        others: (path, path there) of every other file.
        nbytes: of all of them.
        left: paths of files that stay behind: pickles of training that hold no weights, and weights that
            are there twice.
    """

    checkpoints: tuple[tuple[str, str, str], ...]
    others: tuple[tuple[str, str], ...]
    nbytes: int
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Transferred:
    """One checkpoint of a version, converted; `fresh`: by this very call."""

    path: str
    output: str
    published: Published
    fresh: bool


@contextmanager
def scratch(*options: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Storage options with a folder for stores that can only hand out whole files, gone afterwards."""
    if not any("scratch" in each for each in options):
        yield [dict(each) for each in options]
        return
    with tempfile.TemporaryDirectory(prefix="ptbin-") as folder:
        yield [{**each, "scratch": folder} if "scratch" in each else dict(each) for each in options]


def examine(
    source: Folder, style: Style, options: ConvertOptions, source_options: Mapping[str, Any]
) -> Contents:
    """List a version's files and open the index of each checkpoint among them.

    Raises:
        CheckpointError: the first one that cannot be converted, and why.
        NoCheckpointError: there is none.
        OutputCollisionError: two files would be one there.
    """
    root = place_of(source.uri, source_options).file
    sizes = {
        item.path: item.size
        for item in root.iter_objects()
        if not _is_own(item.path) and (source.files is None or item.path in source.files)
    }
    # What an earlier conversion stated of a file is not true of what is made of it now.
    for path in [path for path in sizes if path.endswith(STATEMENT_SUFFIX)]:
        if path.removesuffix(STATEMENT_SUFFIX) in sizes:
            del sizes[path]
    found = []
    members: set[str] = set()
    left: set[str] = set()
    twins = _twins(sizes, options)
    for candidate in find_checkpoints(
        source.uri,
        storage_options=source_options,
        is_other=lambda item: _is_companion(item.path),
        parts=options.parts,
    ):
        if source.files is not None and candidate.path not in source.files and candidate.path in sizes:
            continue
        if candidate.path in twins:
            if twins[candidate.path] == "left":
                left.add(candidate.path)
            continue
        found_at = find_source(candidate.uri, source_options)
        found_at.refuse_part(parts=options.parts)
        with found_at.open() as reader:
            try:
                with as_checkpoint_errors(reader.uri):
                    read_selected(reader, options)
            except NotACheckpointError:
                if candidate.certain and suffix_of(candidate.path) in WEIGHTS_SUFFIXES:
                    raise
                continue
            except CheckpointError as error:
                no_model = isinstance(error, NoStateDictError)
                if left_alone_as(candidate.path, error) or (no_model and is_of_training(candidate.path)):
                    left.add(candidate.path)
                    continue
                if candidate.certain or not no_model:
                    raise
                continue
        found.append(candidate)
        members |= {(found_at.folder / part.path).relative_to(root) for part in found_at.parts} or {
            candidate.path
        }
    if not found:
        raise NoCheckpointError(f"{root.uri}: no checkpoint among its {len(sizes)} files")
    prefix = found[0].path.rpartition("/")[0] if len(found) == 1 and style != "mirror" else ""
    suffix = OUTPUT_SUFFIXES[options.format]
    checkpoints = tuple(
        (item.path, item.uri, _output(item.path, style, suffix, alone=len(found) == 1)) for item in found
    )
    others = tuple((path, _without(path, prefix)) for path in sorted(sizes) if path not in members | left)
    _refuse_collisions([output for *_, output in checkpoints] + [output for _, output in others], root.uri)
    return Contents(checkpoints, others, sum(sizes.values()), tuple(sorted(left)))


def transfer(
    contents: Contents,
    source: Folder,
    place: Folder,
    options: ConvertOptions,
    *,
    current: Folder | None = None,
    source_options: Mapping[str, Any],
    dest_options: Mapping[str, Any],
    annotations: Mapping[str, Any],
    run_id: str,
    progress: Progress | None = None,
    extra: Sequence[tuple[str, str]] = (),
) -> list[Transferred]:
    """Put a version's files into `place`. Errors as `convert` and `copy_file`.

    Args:
        current: where an earlier state of the version is; a checkpoint that is up to date there stays there.
        annotations: what the registry knows of the version; goes into each manifest as `registry`.
        extra: (URI, path in the place) of files from elsewhere that go along; the version's own come first.
    """
    done = []
    base = place.uri.rstrip("/")
    for path, uri, output in contents.checkpoints:
        job = _job(path, uri, f"{base}/{output}", source_options)
        if current is not None:
            there = replace(job, dest_uri=f"{current.uri.rstrip('/')}/{output}")
            if (published := _finished(there, options, dest_options)) is not None:
                done.append(Transferred(path, output, published, fresh=False))
                continue
        done.append(
            _convert(job, uri, output, options, source_options, dest_options, annotations, run_id, progress)
        )
    files = [(f"{source.uri.rstrip('/')}/{path}", output) for path, output in contents.others]
    for uri, output in (*files, *extra):
        copy_file(
            place_of(uri, source_options),
            place_of(f"{base}/{output}", dest_options),
            verify=options.verify != "none",
            change=_looking_at(uri, change_of(output.rpartition("/")[2], options.dtype)),
            progress=progress,
        )
    return done


def _looking_at(uri: str, change: Callable[[bytes], bytes] | None) -> Callable[[bytes], bytes]:
    """The same change, which refuses a Git LFS pointer in place of a file."""

    def looked_at(data: bytes) -> bytes:
        refuse_pointer(data, uri)
        return change(data) if change is not None else data

    return looked_at


def files_of(contents: Contents, done: Sequence[Transferred], extra: Sequence[str]) -> tuple[str, ...]:
    """Paths of everything that belongs to the version now."""
    found = {output for _, output in contents.others} | set(extra)
    for each in done:
        folder = each.output.rpartition("/")[0]
        manifest = each.published.manifest
        found |= {f"{folder}/{part['path']}".lstrip("/") for part in manifest["outputs"]}
        found.add(each.output + MANIFEST_SUFFIX)
        if "provenance" in manifest:
            found.add(f"{folder}/{manifest['provenance']}".lstrip("/"))
    return tuple(sorted(found))


def own_first(contents: Contents, extra: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of files from elsewhere those that take no place of the version's own."""
    taken = {output.casefold() for _, output in contents.others}
    for *_, output in contents.checkpoints:
        taken |= {f"{output}{suffix}".casefold() for suffix in ("", MANIFEST_SUFFIX, STATEMENT_SUFFIX)}
        taken.add(f"{output}.index.json".casefold())
    return [(uri, path) for uri, path in extra if is_plain_path(path) and path.casefold() not in taken]


def _job(path: str, uri: str, dest: str, source_options: Mapping[str, Any]) -> Job:
    found = find_source(uri, source_options)
    if found.parts:
        size, identity = found.size, found.identity
    else:
        stat = found.place.stat()
        size, identity = stat.size, stat.identity
    # The manifest names the source as the engine sees it.
    return Job(found.place.uri, size, dest, path, True, identity)


def _finished(job: Job, options: ConvertOptions, dest_options: Mapping[str, Any]) -> Published | None:
    """What is published there, if it is up to date."""
    if not is_up_to_date(job, options, dest_options=dest_options):
        return None
    manifest = place_of(job.dest_uri, dest_options).beside(MANIFEST_SUFFIX)
    data, seen = manifest.read_identified()
    return Published(parse_manifest(data, manifest.uri), seen)


def _convert(
    job: Job,
    uri: str,
    output: str,
    options: ConvertOptions,
    source_options: Mapping[str, Any],
    dest_options: Mapping[str, Any],
    annotations: Mapping[str, Any],
    run_id: str,
    progress: Progress | None,
) -> Transferred:
    if (published := _finished(job, options, dest_options)) is not None:
        return Transferred(job.path, output, published, fresh=False)
    draft = stage(
        uri,
        job.dest_uri,
        options,
        source_options=source_options,
        dest_options=dest_options,
        run_id=run_id,
        progress=progress,
        guard=None,  # the registry has seen to it that the place is this version's
    )
    draft.manifest["registry"] = dict(annotations)
    published = publish(draft, source_options=source_options, dest_options=dest_options, progress=progress)
    return Transferred(job.path, output, published, fresh=True)


def is_of_training(path: str) -> bool:
    """Whether a pickle without weights is what trainers leave beside them, and no model that was missed."""
    name = path.rpartition("/")[2]
    return companion_of(name) is not None or name.endswith(OF_OTHERS)


def _twins(sizes: Mapping[str, int], options: ConvertOptions) -> dict[str, str]:
    """Weights that lie there twice, as `pytorch_model.bin` and `model.safetensors`: which is not converted.

    The safetensors go along as they are (`along`); where safetensors are asked for they are the source, and
    the pickle stays behind (`left`).
    """
    found = {}
    for path in sizes:
        folder, slash, name = path.rpartition("/")
        other = f"{folder}{slash}model.safetensors"
        if name == "pytorch_model.bin" and other in sizes:
            safe = options.format == "safetensors"
            found[path if safe else other] = "left" if safe else "along"
    return found


def _output(path: str, style: Style, suffix: str, *, alone: bool) -> str:
    if alone and style == "hf":
        return relative_output(path.rpartition("/")[2], "replace", suffix, "hf").rpartition("/")[2]
    if alone and style == "triton":
        return f"model{suffix}"
    return relative_output(path, "replace", suffix, "hf" if style == "hf" else "mirror")


def _without(path: str, prefix: str) -> str:
    """What lies beside the only checkpoint stays beside it."""
    return path[len(prefix) + 1 :] if prefix and path.startswith(f"{prefix}/") else path


def _is_own(path: str) -> bool:
    name = path.rpartition("/")[2]
    # A signature of what lies there would be wrong of what is made of it.
    if name == "model.sig" or path == ".gitattributes":
        return True
    return path.endswith(MANIFEST_SUFFIX) or name in OWN_FILES or "_ptbin" in path.split("/")


def _is_companion(path: str) -> bool:
    name = path.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def _refuse_collisions(outputs: Sequence[str], uri: str) -> None:
    seen: set[str] = set()
    for output in outputs:
        if not is_plain_path(output):
            raise OutputCollisionError(f"{uri}: {output!r} is no plain relative path")
        if output.casefold() in seen:
            raise OutputCollisionError(f"{uri}: two of its files would both be {output}")
        seen.add(output.casefold())
