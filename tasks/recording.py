"""The tasks that store a run's own files in DEST: record, report, checksum list, index of finished work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptbin.catalog.finished import FinishedRow, write_segment
from ptbin.history.failures import Unconverted, write_unconverted
from ptbin.manifests.checksums import CHECKSUM_LIST, tensor_lines
from tasks.batches import single_task
from tasks.listing import plan_of
from tasks.live import find_live_run

__all__ = ["merge_index", "write_index", "write_ledger", "write_run_record"]


@single_task("write run record")
def write_run_record(
    run_id: str, folder_uri: str, files: Mapping[str, bytes], dest: str = "", by_tensor: Sequence[str] = ()
) -> None:
    """Write each file whole, in order; `run.json` comes last, so its presence means the others are there.

    `by_tensor`: manifests below `dest` of outputs without a SHA-256 of their own; the checksum list names
    their tensors'.
    """
    live = find_live_run(run_id)
    folder = live.dest_at(folder_uri)
    for name, data in files.items():
        if name == CHECKSUM_LIST and by_tensor:
            data += tensor_lines(by_tensor, dest, dest_options=live.dest_options).encode()
        (folder / name).write_bytes(data)


@single_task("write index")
def write_index(run_id: str, dest: str, name: str, rows: Sequence[FinishedRow]) -> None:
    """Add what was finished to the index below `dest`, as a segment of that name."""
    write_segment(find_live_run(run_id).dest_at(dest), name, rows)


@single_task("write what was not converted")
def write_ledger(run_id: str, dest: str, rows: Sequence[Unconverted]) -> None:
    """Put these rows in the place of those that earlier runs stored below `dest`."""
    write_unconverted(find_live_run(run_id).dest_at(dest), rows)


@single_task("merge index", retried=False)
def merge_index(run_id: str, dest: str, name: str) -> None:
    """Put one segment in the place of all that the run has read. What another run added meanwhile stays.

    Nothing depends on it: where it fails half-way, some rows are there twice.
    """
    live = find_live_run(run_id)
    work = plan_of(live).work
    folder = live.dest_at(dest)
    write_segment(folder, name, work.iter_finished())
    for path in work.segments():
        (folder / path).delete()
