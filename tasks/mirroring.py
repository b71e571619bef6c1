"""The tasks of a mirror besides conversions: compare, copy, back up, delete."""

from __future__ import annotations

from dataclasses import replace

from ptbin.catalog import Job
from ptbin.catalog.comparing import (
    change_on_copying,
    compare_job,
    may_replace_copy,
)
from ptbin.catalog.finished import row_of_copy
from ptbin.catalog.mirroring import is_reached_plainly
from ptbin.errors import NoSpaceError, NotFoundInStoreError
from ptbin.options import ConvertOptions
from ptbin.runs.outcomes import Converted, Outcome, outcome_of_error
from ptbin.stores.copying import copy_file
from tasks.batches import batch_task
from tasks.live import LiveRun


@batch_task("compare batch")
def compare_batch(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    """Whether an output is what its source would become now: `up_to_date`, else `changed`."""
    same = compare_job(job, options, live.sides, progress=live.moved)
    if same is None:
        return Outcome(job.path, "changed")
    return Outcome(job.path, "up_to_date", converted=Converted.known(same.row))


@batch_task("copy batch")
def copy_batch(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    """Copy a file as it is, but for what a cast makes wrong in it (`sidecars.change_of`)."""
    copied = copy_file(
        live.sides.source_at(job.source_uri),
        live.sides.dest_at(job.dest_uri),
        expected=job.identity,
        verify=options.verify != "none",
        change=change_on_copying(job.source_uri, job.output_name, options, size=job.source_size),
        progress=live.moved,
        may_replace=may_replace_copy(job, options),
    )
    # A copy has no manifest: the run's record says what changed.
    detail = f"changed: its element type is {options.dtype} now" if copied.changed else ""
    moved = (copied.size - copied.copied_nbytes, copied.size, copied.copied_nbytes)
    facts = Converted("", (), 0, *moved, index_row=row_of_copy(job, "", copied, options))
    return Outcome(job.path, "copied", detail=detail, converted=facts)


@batch_task("back up")
def back_up_batch(live: LiveRun, path: str, dest: str, backup: str) -> Outcome:
    """Copy a file of DEST (its path below it) to the same path below the backup place."""
    try:
        copy_file(live.sides.dest_at(dest) / path, live.sides.dest_at(backup) / path, progress=live.moved)
    except NotFoundInStoreError:
        return Outcome(path, "not_tried")  # gone meanwhile: nothing is lost by going on
    except NoSpaceError as error:
        # There, not in DEST: a file that was not tried would be written over without a copy of it.
        return replace(outcome_of_error(path, error), is_full=False)
    return Outcome(path, "copied")


@batch_task("delete")
def delete_batch(live: LiveRun, path: str, dest: str) -> Outcome:
    """Delete a file of DEST. They come in order: manifests before what they vouch for."""
    folder = live.sides.dest_at(dest)
    if not is_reached_plainly(folder, path):
        return Outcome(path, "not_tried")  # a link took its place: what it leads to is not ours
    (folder / path).delete()
    return Outcome(path, "deleted")
