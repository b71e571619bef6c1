"""The files of one version from registry to registry: its plan carried out.

Converts, proves and copies; whether the version then counts is for the registry to say. Done twice, it finds
its own work and goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptbin.catalog.comparing import change_on_copying
from ptbin.catalog.finished import find_finished
from ptbin.catalog.jobs import Job
from ptbin.conversion import Published, publish_at, stage
from ptbin.manifests.manifest import MANIFEST_SUFFIX
from ptbin.options import ConvertOptions
from ptbin.registries.contents import Contents
from ptbin.stores import NO_OPTIONS, Place, Sides
from ptbin.stores.copying import copy_file

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Transferred:
    """One checkpoint of a version, converted; `fresh`: by this very call."""

    job: Job
    published: Published
    fresh: bool


def transfer(
    contents: Contents,
    place: Place,
    options: ConvertOptions,
    *,
    current: Place | None = None,
    sides: Sides = NO_OPTIONS,
    annotations: Mapping[str, Any],
    run_id: str,
    progress: Progress | None = None,
) -> list[Transferred]:
    """Put a version's files into `place`. Errors as `convert` and `copy_file`.

    Args:
        current: where an earlier state of the version is; a checkpoint that is up to date there stays there.
        sides: for the files of the model that go along.
        annotations: what the registry knows of the version; goes into each manifest as `registry`.
    """
    done = []
    for job in contents.conversions:
        dest = place / job.dest_uri
        places = [dest] if current is None else [current / job.dest_uri, dest]
        finished = (find_finished(job, options, where) for where in places)
        if (published := next(filter(None, finished), None)) is not None:
            done.append(Transferred(job, published, fresh=False))
            continue
        source = contents.source_of(job)
        # No guard: the registry has seen to it that the place is this version's.
        draft = stage(source, dest, options, run_id=run_id, progress=progress, guard=None)
        draft.manifest["registry"] = dict(annotations)
        done.append(Transferred(job, publish_at(draft, source, dest, progress), fresh=True))
    files = [(contents.source_of(job), job.dest_uri) for job in contents.copies]
    files += [(sides.source_at(uri), path) for uri, path in contents.beside]
    for source, path in files:
        copy_file(
            source,
            place / path,
            verify=options.verify != "none",
            change=change_on_copying(source.uri, (place / path).name, options),
            progress=progress,
        )
    return done


def files_of(contents: Contents, done: Sequence[Transferred]) -> tuple[str, ...]:
    """Paths of everything that belongs to the version now."""
    found = {job.dest_uri for job in contents.copies} | {path for _, path in contents.beside}
    for each in done:
        folder = each.job.dest_uri.rpartition("/")[0]
        manifest = each.published.manifest
        found |= {f"{folder}/{part['path']}".lstrip("/") for part in manifest["outputs"]}
        found.add(each.job.dest_uri + MANIFEST_SUFFIX)
        if "provenance" in manifest:
            found.add(f"{folder}/{manifest['provenance']}".lstrip("/"))
    return tuple(sorted(found))
