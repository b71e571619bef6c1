"""The task of the restore flow: weights back into `.pt` files, one outcome per job."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

import ptbin
from ptbin import RestoreOptions
from ptbin.catalog import Job
from ptbin.errors import NotACheckpointError
from ptbin.manifests.manifest import manifest_uri
from ptbin.stores.limits import limit_requests
from tasks.live import LiveRun, Ticket, enter_run
from tasks.outcomes import Converted, Outcome, outcome_of_error
from tasks.stepping import each

__all__ = ["restore_batch"]


@task(
    name="restore batch",
    task_run_name="restore {label}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def restore_batch(ticket: Ticket, label: str, jobs: Sequence[Job], options: RestoreOptions) -> list[Outcome]:
    """Restore each job, proven and with its manifest; one outcome per job, in order."""
    del label
    live = enter_run(ticket)
    return each(jobs, lambda job: _restore(live, job, options))


def _restore(live: LiveRun, job: Job, options: RestoreOptions) -> Outcome:
    live.moved(0)
    try:
        with limit_requests(live.requests):
            manifest = ptbin.restore(
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
    except Exception as error:  # noqa: BLE001 - what is wrong with one must not stop the others
        return outcome_of_error(job.path, error)
    converted = Converted.from_manifest(manifest, manifest_uri(job.dest_uri))
    return Outcome(job.path, "converted", converted=converted)
