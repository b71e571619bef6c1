"""The tasks that make outputs: `convert_batch` writes, `verify_batch` proves and writes manifests.

A batch that is stopped half-way leaves outputs without manifests at worst, which nobody takes for finished.
"""

from __future__ import annotations

import ptbin
from ptbin.catalog import Job
from ptbin.errors import CheckpointError
from ptbin.manifests.manifest import manifest_uri
from ptbin.options import ConvertOptions
from tasks.batches import batch_task
from tasks.live import LiveRun
from tasks.outcomes import Converted, Outcome, Staged, outcome_of_job

__all__ = ["convert_and_verify_batch", "convert_batch", "verify_batch"]


@batch_task("convert batch")
def convert_batch(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    """Write the output of a job: `staged` where it was written."""
    return _stage(live, job, options)


@batch_task("verify batch")
def verify_batch(live: LiveRun, staged: Staged) -> Outcome:
    """Prove a draft against its source and write its manifest."""
    assert isinstance(staged.item, Job)
    return _publish(live, staged.item, staged.outcome.draft or "")


@batch_task("convert and verify batch")
def convert_and_verify_batch(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    """Both at once: where a task run costs a tenth of a second."""
    outcome = _stage(live, job, options)
    if outcome.draft is None:
        return outcome
    live.moved(0)
    return _publish(live, job, outcome.draft)


def _stage(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    try:
        draft = ptbin.stage(
            job.source_uri,
            job.dest_uri,
            options,
            source_options=live.source_options,
            dest_options=live.dest_options,
            run_id=live.run_id,
            progress=live.moved,
            standing=job.standing,
        )
    except CheckpointError as error:
        return outcome_of_job(job, error)
    return Outcome(job.path, "staged", draft=draft.to_json())


def _publish(live: LiveRun, job: Job, draft: str) -> Outcome:
    published = ptbin.publish(
        ptbin.Draft.from_json(draft),
        source_options=live.source_options,
        dest_options=live.dest_options,
        progress=live.moved,
    )
    converted = Converted.from_manifest(published.manifest, manifest_uri(job.dest_uri), published.identity)
    return Outcome(job.path, "converted", converted=converted)
