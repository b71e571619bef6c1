"""One job, with every end an `Outcome`: what Prefect's tasks and plain threads have in common.

`sides` are `source_options` and `dest_options`, as all functions of the engine take them.
"""

from __future__ import annotations

from typing import Any

from ptbin.catalog.jobs import Job
from ptbin.conversion import Progress, publish, stage
from ptbin.errors import CheckpointError
from ptbin.manifests.draft import Draft
from ptbin.manifests.manifest import manifest_uri
from ptbin.options import ConvertOptions
from ptbin.restoring.options import RestoreOptions
from ptbin.restoring.restore import restore
from ptbin.runs.outcomes import Converted, Outcome, outcome_of_job

__all__ = ["publish_job", "restore_job", "stage_job"]


def stage_job(
    job: Job,
    options: ConvertOptions,
    *,
    run_id: str,
    progress: Progress,
    **sides: Any,
) -> Outcome:
    """Write the output of a job: `staged` where it was written. Raises what is not the checkpoint's fault."""
    try:
        draft = stage(
            job.source_uri,
            job.dest_uri,
            options,
            run_id=run_id,
            progress=progress,
            standing=job.standing,
            **sides,
        )
    except CheckpointError as error:
        return outcome_of_job(job, error)
    return Outcome(job.path, "staged", draft=draft.to_json())


def publish_job(job: Job, draft: str, *, progress: Progress, **sides: Any) -> Outcome:
    """Prove what was written and write the manifest: `converted`. Raises as `ptbin.publish`."""
    published = publish(Draft.from_json(draft), progress=progress, **sides)
    converted = Converted.from_manifest(published.manifest, manifest_uri(job.dest_uri), published.identity)
    return Outcome(job.path, "converted", converted=converted)


def restore_job(
    job: Job,
    options: RestoreOptions,
    *,
    run_id: str,
    progress: Progress,
    **sides: Any,
) -> Outcome:
    """Restore a job, proven and with its manifest. Raises what is not the file's fault."""
    try:
        manifest = restore(
            job.source_uri,
            job.dest_uri,
            options,
            run_id=run_id,
            progress=progress,
            standing=job.standing,
            **sides,
        )
    except CheckpointError as error:
        return outcome_of_job(job, error)
    converted = Converted.from_manifest(manifest, manifest_uri(job.dest_uri))
    return Outcome(job.path, "converted", converted=converted)
