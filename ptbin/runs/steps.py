"""One job, with every end an `Outcome`: what Prefect's tasks and plain threads have in common."""

from __future__ import annotations

from ptbin.catalog.jobs import Job
from ptbin.conversion import Progress, publish_at, stage
from ptbin.errors import CheckpointError
from ptbin.manifests.draft import Draft
from ptbin.manifests.manifest import manifest_uri
from ptbin.options import ConvertOptions
from ptbin.restoring.options import RestoreOptions
from ptbin.restoring.restore import restore
from ptbin.runs.outcomes import Converted, Outcome, outcome_of_job
from ptbin.stores import Sides


def stage_job(job: Job, options: ConvertOptions, sides: Sides, *, run_id: str, progress: Progress) -> Outcome:
    """Write the output of a job: `staged` where it was written. Raises what is not the checkpoint's fault."""
    source, dest = sides.source_at(job.source_uri), sides.dest_at(job.dest_uri)
    try:
        draft = stage(source, dest, options, run_id=run_id, progress=progress, standing=job.standing)
    except CheckpointError as error:
        return outcome_of_job(job, error)
    return Outcome(job.path, "staged", draft=draft.to_json())


def publish_job(job: Job, draft: str, sides: Sides, *, progress: Progress) -> Outcome:
    """Prove what was written and write the manifest: `converted`. Raises as `ptbin.publish`."""
    source, dest = sides.source_at(job.source_uri), sides.dest_at(job.dest_uri)
    published = publish_at(Draft.from_json(draft), source, dest, progress)
    converted = Converted.from_manifest(published.manifest, manifest_uri(job.dest_uri), published.identity)
    return Outcome(job.path, "converted", converted=converted)


def restore_job(
    job: Job, options: RestoreOptions, sides: Sides, *, run_id: str, progress: Progress
) -> Outcome:
    """Restore a job, proven and with its manifest. Raises what is not the file's fault."""
    source, dest = sides.source_at(job.source_uri), sides.dest_at(job.dest_uri)
    try:
        manifest = restore(source, dest, options, run_id=run_id, progress=progress, standing=job.standing)
    except CheckpointError as error:
        return outcome_of_job(job, error)
    converted = Converted.from_manifest(manifest, manifest_uri(job.dest_uri))
    return Outcome(job.path, "converted", converted=converted)
