"""The tasks that make outputs, prove them, and ask what is up to date already.

A batch that is stopped half-way leaves outputs without manifests at worst, which no run takes for finished.
"""

from __future__ import annotations

from ptbin.catalog import Job
from ptbin.options import ConvertOptions, VerifyLevel
from ptbin.restoring.options import RestoreOptions
from ptbin.runs.outcomes import Converted, Outcome, Staged
from ptbin.runs.steps import publish_job, restore_job, stage_job
from ptbin.runs.verifying import verify_manifest
from tasks.batches import batch_task
from tasks.live import LiveRun


@batch_task("find up-to-date outputs")
def find_up_to_date(live: LiveRun, job: Job) -> Outcome:
    """Read the manifest of a job that the index of finished work does not know.

    It never fails a checkpoint: the conversion meets the same problem and reports it.
    """
    row = live.opened_plan.read_finished(job)
    if row is None:
        return Outcome(job.path, "changed")
    return Outcome(job.path, "up_to_date", converted=Converted.known(row))


@batch_task("convert batch")
def convert_batch(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    """Write the output of a job: `staged` where it was written."""
    return stage_job(job, options, live.sides, run_id=live.run_id, progress=live.moved)


@batch_task("verify batch")
def verify_batch(live: LiveRun, staged: Staged) -> Outcome:
    """Prove a draft against its source and write its manifest."""
    assert isinstance(staged.item, Job)
    return publish_job(staged.item, staged.outcome.draft or "", live.sides, progress=live.moved)


@batch_task("convert and verify batch")
def convert_and_verify_batch(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    """Both at once: where a task run costs a tenth of a second."""
    outcome = stage_job(job, options, live.sides, run_id=live.run_id, progress=live.moved)
    if outcome.draft is None:
        return outcome
    live.moved(0)
    return publish_job(job, outcome.draft, live.sides, progress=live.moved)


@batch_task("restore batch")
def restore_batch(live: LiveRun, job: Job, options: RestoreOptions) -> Outcome:
    """Restore a job, proven and with its manifest."""
    return restore_job(job, options, live.sides, run_id=live.run_id, progress=live.moved)


@batch_task("verify manifests")
def verify_manifests(live: LiveRun, uri: str, level: VerifyLevel) -> Outcome:
    """Read back what a manifest vouches for."""
    return verify_manifest(live.sides.dest_at(uri), level, live.moved)
