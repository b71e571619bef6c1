"""The task that stores a run's own files (run record, report, checksum list) in DEST."""

from __future__ import annotations

from collections.abc import Mapping

from prefect import task
from prefect.cache_policies import NO_CACHE

from ptbin.stores import open_store
from tasks.live import find_live_run
from tasks.retrying import JITTER, RETRIES, RETRY_DELAYS, worth_retrying

__all__ = ["write_run_record"]


@task(
    name="write run record",
    tags=["ptbin", "record"],
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def write_run_record(run_id: str, folder_uri: str, files: Mapping[str, bytes]) -> None:
    """Write each file whole, in order; `run.json` comes last, so its presence means the others are there."""
    store, folder = open_store(folder_uri, find_live_run(run_id).dest_options)
    for name, data in files.items():
        store.write_bytes(f"{folder}/{name}", data)
