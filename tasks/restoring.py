"""The task of the restore flow: weights back into `.pt` files."""

from __future__ import annotations

import ptbin
from ptbin import RestoreOptions
from ptbin.catalog import Job
from ptbin.errors import CheckpointError
from ptbin.manifests.manifest import manifest_uri
from ptbin.runs.outcomes import Converted, Outcome, outcome_of_job
from tasks.batches import batch_task
from tasks.live import LiveRun

__all__ = ["restore_batch"]


@batch_task("restore batch")
def restore_batch(live: LiveRun, job: Job, options: RestoreOptions) -> Outcome:
    """Restore a job, proven and with its manifest."""
    try:
        manifest = ptbin.restore(
            live.source_at(job.source_uri),
            live.dest_at(job.dest_uri),
            options,
            run_id=live.run_id,
            progress=live.moved,
            standing=job.standing,
        )
    except CheckpointError as error:
        return outcome_of_job(job, error)
    converted = Converted.from_manifest(manifest, manifest_uri(job.dest_uri))
    return Outcome(job.path, "converted", converted=converted)
