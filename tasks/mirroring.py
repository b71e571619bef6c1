"""The tasks of a mirror beside conversions: compare, copy, back up, delete. One outcome per job or file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from prefect import task
from prefect.cache_policies import NO_CACHE

from ptbin.catalog import Job
from ptbin.catalog.comparing import find_unchanged, release_companions
from ptbin.catalog.finished import row_of_copy
from ptbin.catalog.marks import may_replace_copy
from ptbin.catalog.mirroring import Gone, is_reached_plainly, iter_gone
from ptbin.errors import NotFoundInStoreError
from ptbin.manifests.manifest import manifest_uri
from ptbin.options import ConvertOptions
from ptbin.sources.companions import MAX_POINTER_NBYTES, refuse_pointer
from ptbin.sources.sidecars import change_of
from ptbin.stores.copying import Copied, copy_file, same_content
from ptbin.stores.limits import limit_requests
from tasks.live import Interrupted, LiveRun, Ticket, enter_run, find_live_run
from tasks.outcomes import Converted, Outcome, outcome_of_error
from tasks.retrying import JITTER, RETRIES, RETRY_DELAYS, worth_retrying
from tasks.stepping import each

__all__ = ["back_up_batch", "compare_batch", "copy_batch", "delete_batch", "find_gone", "release_outputs"]


@task(
    name="compare batch",
    task_run_name="compare {label}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def compare_batch(ticket: Ticket, label: str, jobs: Sequence[Job], options: ConvertOptions) -> list[Outcome]:
    """Which outputs are what their sources would become now: `up_to_date`, else `changed`."""
    del label
    live = enter_run(ticket)
    return each(jobs, lambda job: _compare(live, job, options))


def _compare(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    live.moved(0)
    try:
        with limit_requests(live.requests):
            if job.copies:
                return _compare_copy(live, job, options)
            same = find_unchanged(
                live.source_at(job.source_uri),
                live.dest_at(job.dest_uri),
                options,
                progress=live.moved,
            )
    except Exception:  # noqa: BLE001 - whatever it is, the conversion meets it again and reports it
        return Outcome(job.path, "changed")
    if same is None:
        return Outcome(job.path, "changed")
    converted = Converted.from_manifest(same.manifest, manifest_uri(job.dest_uri), same.identity)
    return Outcome(job.path, "up_to_date", converted=converted)


def _compare_copy(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    same = same_content(
        live.source_at(job.source_uri),
        live.dest_at(job.dest_uri),
        change=_change_of(job, options),
        progress=live.moved,
    )
    if same is None:
        return Outcome(job.path, "changed")
    facts = replace(_copied(job, same, options), read_nbytes=0, written_nbytes=0, copied_nbytes=0)
    return Outcome(job.path, "up_to_date", converted=facts)


def _change_of(job: Job, options: ConvertOptions) -> Callable[[bytes], bytes] | None:
    """What is to become of the content on its way; a Git LFS pointer in place of a file is refused."""
    change = change_of(job.dest_uri.rpartition("/")[2], options.dtype)
    if job.source_size > MAX_POINTER_NBYTES:
        return change

    def looked_at(data: bytes) -> bytes:
        refuse_pointer(data, job.source_uri)
        return change(data) if change is not None else data

    return looked_at


@task(
    name="copy batch",
    task_run_name="copy {label}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def copy_batch(ticket: Ticket, label: str, jobs: Sequence[Job], options: ConvertOptions) -> list[Outcome]:
    """Copy each file as it is, but for what a cast makes wrong in it (`sidecars.change_of`)."""
    del label
    live = enter_run(ticket)
    return each(jobs, lambda job: _copy(live, job, options))


def _copy(live: LiveRun, job: Job, options: ConvertOptions) -> Outcome:
    live.moved(0)
    try:
        with limit_requests(live.requests):
            copied = copy_file(
                live.source_at(job.source_uri),
                live.dest_at(job.dest_uri),
                expected=job.identity,
                verify=options.verify != "none",
                change=_change_of(job, options),
                progress=live.moved,
                may_replace=may_replace_copy(job, options),
            )
    except Exception as error:  # noqa: BLE001 - what is wrong with one must not stop the others
        return outcome_of_error(job.path, error)
    # No manifest tells of a copy: the run's record does.
    detail = f"changed: its element type is {options.dtype} now" if copied.changed else ""
    return Outcome(job.path, "copied", detail=detail, converted=_copied(job, copied, options))


def _copied(job: Job, copied: Copied, options: ConvertOptions) -> Converted:
    return Converted(
        manifest_uri="",
        outputs=(),
        tensors=0,
        read_nbytes=copied.size - copied.copied_nbytes,
        written_nbytes=copied.size,
        copied_nbytes=copied.copied_nbytes,
        index_row=row_of_copy(job, "", copied, options),
    )


@task(
    name="back up",
    task_run_name="back up {label}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def back_up_batch(ticket: Ticket, label: str, dest: str, backup: str, files: Sequence[str]) -> list[Outcome]:
    """Copy files of DEST (paths below it) to the same paths below the backup place."""
    del label
    live = enter_run(ticket)

    def back_up(path: str) -> Outcome:
        try:
            with limit_requests(live.requests):
                copy_file(
                    live.dest_at(dest) / path,
                    live.dest_at(backup) / path,
                    progress=live.moved,
                )
        except NotFoundInStoreError:
            return Outcome(path, "not_tried")  # gone meanwhile: nothing is lost by going on
        except Exception as error:  # noqa: BLE001 - as in `_copy`
            return outcome_of_error(path, error)
        return Outcome(path, "copied")

    return _until_stopped(live, files, back_up)


@task(
    name="delete",
    task_run_name="delete {label}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def delete_batch(ticket: Ticket, label: str, dest: str, files: Sequence[str]) -> list[Outcome]:
    """Delete files of DEST, in order: manifests come before what they vouch for."""
    del label
    live = enter_run(ticket)
    folder = live.dest_at(dest)

    def delete(path: str) -> Outcome:
        live.moved(0)
        if not is_reached_plainly(folder, path):
            return Outcome(path, "not_tried")  # a link took its place: what it leads to is not ours
        try:
            with limit_requests(live.requests):
                (folder / path).delete()
        except Exception as error:  # noqa: BLE001 - as in `_copy`
            return outcome_of_error(path, error)
        return Outcome(path, "deleted")

    return _until_stopped(live, files, delete)


def _until_stopped(live: LiveRun, files: Sequence[str], do: object) -> list[Outcome]:
    assert callable(do)
    outcomes: list[Outcome] = []
    try:
        for path in files:
            live.moved(0)
            outcomes.append(do(path))
    except Interrupted:
        pass
    return outcomes + [Outcome(path, "not_tried") for path in files[len(outcomes) :]]


@task(
    name="find what is gone",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def find_gone(run_id: str, source: str, exclude: Sequence[str]) -> list[Gone]:
    """What earlier runs made of SOURCE and this one would not; reads the manifests of the candidates."""
    live = find_live_run(run_id)
    assert live.work is not None, "the flow opens a work list first"
    with limit_requests(live.requests):
        return list(
            iter_gone(
                live.work,
                source,
                exclude=exclude,
                source_options=live.source_options,
                tick=live.tick,
            )
        )


@task(name="release companions", cache_policy=NO_CACHE, persist_result=False)
def release_outputs(run_id: str, listed: Mapping[str, Sequence[str]]) -> dict[str, Outcome]:
    """Take the names off each manifest, by its URI; what went wrong, by the same."""
    live = find_live_run(run_id)
    failed = {}
    for uri, names in listed.items():
        live.tick()
        try:
            with limit_requests(live.requests):
                release_companions(live.dest_at(uri), names)
        except Exception as error:  # noqa: BLE001 - as in `_copy`
            failed[uri] = outcome_of_error(uri, error)
    return failed
