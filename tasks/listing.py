"""The tasks that only look: list what lies in a store, and ask what is up to date already.

A listing is one task of its own and retried whole. The question whether an output is current reads one
manifest per checkpoint and goes in batches; it never fails a checkpoint, because "no" only means that
the conversion itself will meet the same problem and report it.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from ptbin import catalog
from ptbin.catalog import Found, Job
from ptbin.errors import PtbinError
from ptbin.options import ConvertOptions
from tasks.live import find_live_run
from tasks.retrying import JITTER, RETRIES, RETRY_DELAYS, worth_retrying

__all__ = ["find_up_to_date", "list_checkpoints", "list_manifests", "list_orphans"]


@task(
    name="list checkpoints",
    tags=["ptbin", "list"],
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def list_checkpoints(run_id: str, source: str, include: Sequence[str], exclude: Sequence[str]) -> list[Found]:
    """Every checkpoint below `source`, in the order the store lists them."""
    live = find_live_run(run_id)
    return list(
        catalog.find_checkpoints(
            source, include=tuple(include), exclude=tuple(exclude), storage_options=live.source_options
        )
    )


@task(
    name="find up-to-date outputs",
    task_run_name="up to date? {label}",
    tags=["ptbin", "list"],
    cache_policy=NO_CACHE,
    persist_result=False,
)
def find_up_to_date(run_id: str, label: str, jobs: Sequence[Job], options: ConvertOptions) -> list[str]:
    """The paths among `jobs` whose outputs are current; one small read of DEST for each."""
    del label
    live = find_live_run(run_id)
    current = []
    for job in jobs:
        live.moved(0)
        try:
            if catalog.is_up_to_date(job, options, dest_options=live.dest_options):
                current.append(job.path)
        except PtbinError:
            continue  # the conversion will meet the same problem and report it
    return current


@task(
    name="list manifests",
    tags=["ptbin", "list"],
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def list_manifests(run_id: str, dest: str) -> list[str]:
    """The URI of every manifest below `dest`."""
    return list(catalog.find_manifests(dest, storage_options=find_live_run(run_id).dest_options))


@task(
    name="list orphans",
    tags=["ptbin", "list"],
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def list_orphans(run_id: str, dest: str) -> list[str]:
    """The URI of every output below `dest` that no manifest vouches for."""
    return list(catalog.find_orphans(dest, storage_options=find_live_run(run_id).dest_options))
