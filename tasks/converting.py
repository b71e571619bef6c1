"""The tasks that make outputs: `convert_batch` writes, `verify_batch` proves and writes manifests.

Neither fails because of a checkpoint: what goes wrong with one becomes its outcome and the batch goes
on. What a store may do better next time is marked transient and left to the flow to try again. A batch
that is stopped half-way leaves outputs without manifests at worst, which nobody takes for finished.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

import ptbin
from ptbin.catalog import Job
from ptbin.errors import CheckpointError, NotACheckpointError
from ptbin.manifests.manifest import manifest_uri
from ptbin.options import ConvertOptions
from ptbin.sources.companions import left_alone_as
from ptbin.stores.limits import limit_requests
from tasks.live import LiveRun, Ticket, enter_run
from tasks.outcomes import Converted, Outcome, outcome_of_error
from tasks.stepping import each

__all__ = ["convert_and_verify_batch", "convert_batch", "verify_batch"]


@task(
    name="convert batch",
    task_run_name="convert {label}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def convert_batch(ticket: Ticket, label: str, jobs: Sequence[Job], options: ConvertOptions) -> list[Outcome]:
    """Write the output of each job; one outcome per job, in order, `staged` where it was written."""
    del label
    live = enter_run(ticket)
    return each(jobs, lambda job: _stage(live, job, options))


@task(
    name="verify batch",
    task_run_name="verify {label}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def verify_batch(ticket: Ticket, label: str, jobs: Sequence[Job], drafts: Sequence[str]) -> list[Outcome]:
    """Prove each draft against its source and write its manifest; one outcome per job, in order."""
    del label
    live = enter_run(ticket)
    draft_of = {job.path: draft for job, draft in zip(jobs, drafts, strict=True)}
    return each(jobs, lambda job: _commit(live, job, draft_of[job.path]))


@task(
    name="convert and verify batch",
    task_run_name="convert and verify {label}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def convert_and_verify_batch(
    ticket: Ticket, label: str, jobs: Sequence[Job], options: ConvertOptions
) -> list[Outcome]:
    """Both at once, one checkpoint after the other: where a task run costs a tenth of a second."""
    del label
    live = enter_run(ticket)
    return each(jobs, lambda job: _convert(live, job, options))


def _convert(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    outcome = _stage(live, job, options)
    return _commit(live, job, outcome.draft) if outcome.draft is not None else outcome


def _stage(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    live.moved(0)
    try:
        with limit_requests(live.requests):
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
    except NotACheckpointError as error:
        # Only its place made it a candidate: a directory holds other things too.
        return outcome_of_error(job.path, error) if job.certain else Outcome(job.path, "not_a_checkpoint")
    except CheckpointError as error:
        role = left_alone_as(job.path, error)
        return (
            outcome_of_error(job.path, error)
            if role is None
            else Outcome(job.path, "left_alone", detail=role)
        )
    except Exception as error:  # noqa: BLE001 - a fault of ours in one checkpoint must not stop the others
        return outcome_of_error(job.path, error)
    return Outcome(job.path, "staged", draft=draft.to_json())


def _commit(live: LiveRun, job: Job, draft: str) -> Outcome:
    live.moved(0)
    try:
        with limit_requests(live.requests):
            published = ptbin.publish(
                ptbin.Draft.from_json(draft),
                source_options=live.source_options,
                dest_options=live.dest_options,
                progress=live.moved,
            )
        converted = Converted.from_manifest(
            published.manifest, manifest_uri(job.dest_uri), published.identity
        )
    except Exception as error:  # noqa: BLE001 - as in `_stage`
        return outcome_of_error(job.path, error)
    return Outcome(job.path, "converted", converted=converted)
