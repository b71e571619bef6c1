"""The tasks that store a run's own files in DEST: record, report, checksum list, index of finished work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptbin.catalog.finished import FinishedRow, write_segment
from ptbin.history.failures import Unconverted, write_unconverted
from ptbin.runs.ending import write_record_files
from tasks.batches import single_task
from tasks.listing import plan_of
from tasks.live import find_live_run

__all__ = ["merge_index", "write_index", "write_ledger", "write_run_record"]


@single_task("write run record")
def write_run_record(
    run_id: str, folder_uri: str, files: Mapping[str, bytes], dest: str = "", by_tensor: Sequence[str] = ()
) -> None:
    """As `ptbin.runs.ending.write_record_files`."""
    options = find_live_run(run_id).dest_options
    write_record_files(folder_uri, files, dest, by_tensor, options)


@single_task("write index")
def write_index(run_id: str, dest: str, name: str, rows: Sequence[FinishedRow]) -> None:
    """Add what was finished to the index below `dest`, as a segment of that name."""
    write_segment(find_live_run(run_id).dest_at(dest), name, rows)


@single_task("write what was not converted")
def write_ledger(run_id: str, dest: str, rows: Sequence[Unconverted]) -> None:
    """Put these rows in the place of those that earlier runs stored below `dest`."""
    write_unconverted(find_live_run(run_id).dest_at(dest), rows)


@single_task("merge index", retried=False)
def merge_index(run_id: str, name: str) -> None:
    """As `Plan.merge_index`."""
    plan_of(find_live_run(run_id)).merge_index(name)
