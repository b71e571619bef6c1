"""The sync flow: DEST becomes a mirror of SOURCE, its checkpoints as weights, its other files as they are.

Convert what is new or changed, copy companions along, and, where asked, delete what earlier runs put into
DEST and SOURCE no longer has. Nothing is deleted when anything went wrong, and never a file that ptbin did
not put there. What is written over or deleted goes to the backup place first, if there is one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.access import DEFAULT_REQUESTS, Running, RunSettings, join_run, running
from flows.batches import cut, iter_batches
from flows.conversion import LOGGED, Conversion, halves
from flows.fanout import Work, unexamined
from flows.parameters import described
from flows.run_record import new_run_id
from flows.runners import RunnerName
from flows.selection import Selection
from flows.tally import LISTED, Tally
from flows.wishes import MAX_WORKERS, build_options, parse_duration, refuse_secrets
from ptbin.catalog import Job, OutputRule, Problem
from ptbin.catalog.checks import check_mirror
from ptbin.catalog.entries import nothing_below
from ptbin.catalog.mirroring import alone, excess
from ptbin.catalog.suffixes import OUTPUT_SUFFIXES
from ptbin.errors import StorageError, UsageError
from ptbin.manifests.manifest import manifest_uri
from ptbin.options import ConvertOptions, FileDigest, Layout, Naming, OnUnsafe, OutputFormat, VerifyLevel
from tasks.listing import list_mirror, work_of
from tasks.mirroring import back_up_batch, compare_batch, copy_batch, delete_batch, find_gone, release_outputs
from tasks.outcomes import Outcome, one_line
from tasks.retrying import RETRIES, retry_delay

__all__ = ["MirrorSettings", "Synchronization", "sync"]

FILES_PER_BATCH = 200
MIRROR_BATCHES = 80
"""Of comparisons, conversions and copies each; with backups and deletions about 500 task runs at most."""


INDEX_SECONDS = 10.0
"""How often the index of finished work is written while files are copied: only it vouches for copies."""


class MirrorSettings:
    """What `sync` does beyond converting."""

    def __init__(
        self,
        *,
        delete: bool = False,
        max_delete: int | None = None,
        checksum: bool = False,
        immutable: bool = False,
        backup_dir: str | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        if max_delete is not None and not delete:
            raise UsageError("a limit on deletions means nothing without --delete")
        self.delete = delete
        self.max_delete = max_delete
        self.checksum = checksum
        self.immutable = immutable
        self.backup_dir = backup_dir
        self.exclude = tuple(exclude)


@dataclass(slots=True)
class MirrorTally(Tally):
    """A tally that also names what was deleted: nothing else tells of it afterwards."""

    deleted: list[str] = field(default_factory=list)
    """Paths below DEST, the first `LISTED`."""

    def summary(self, seconds: float) -> dict[str, Any]:
        """As a conversion's, with `deleted_paths`."""
        return Tally.summary(self, seconds) | {"deleted_paths": list(self.deleted)}


class Synchronization(Conversion):
    """A conversion that also compares, copies, backs up and deletes."""

    artifact_key = "ptbin-sync"
    tally: MirrorTally

    def __init__(
        self,
        run: Running,
        options: ConvertOptions,
        tally: MirrorTally,
        fail_fast: bool,
        mirror: MirrorSettings,
    ) -> None:
        super().__init__(run, options, tally, fail_fast)
        self.mirror = mirror
        self.indexed = time.monotonic()

    def run(self) -> None:
        if self.mirror.checksum:
            self._compare_all()
        if self.mirror.immutable:
            self._refuse_changes()
        if self.mirror.backup_dir is not None:
            self._back_up()
        if self.work.rule.layout == "hf":
            self._release_companions()
        super().run()
        if self.mirror.delete:
            self._delete_gone()

    # -- what is to be done -----------------------------------------------------------------------

    def _compare_all(self) -> None:
        """By content: what would come out the same is not to be done."""
        count, nbytes = self.work.to_do()

        def compare(jobs: Sequence[Job], lost: int = 0) -> Work:
            def then(state: State[Any]) -> Iterable[Work]:
                if self._was_lost(jobs, state, lost):
                    yield from (compare(part, lost + 1) for part in halves(jobs))
                    return
                outcomes: list[Outcome] = state.result() if state.is_completed() else []
                for job, outcome in zip(jobs, outcomes, strict=False):
                    if outcome.kind != "up_to_date":
                        continue
                    self.work.settle_current(job)
                    if outcome.converted is not None and outcome.converted.index_row is not None:
                        path = self.work.relative_manifest(job)
                        self._remember([replace(outcome.converted.index_row, manifest=path)])

            return Work(
                lambda: self._submit(
                    compare_batch, label=self._label(jobs, 0), jobs=jobs, options=self.options
                ),
                then,
            )

        jobs = list(self.work.iter_to_do())
        batches = iter_batches(
            jobs,
            count,
            nbytes,
            nbytes=lambda job: job.source_size,
            workers=self.runner.width,
            max_batches=MIRROR_BATCHES,
        )
        self._fan_out(compare(batch) for batch in batches)

    def _refuse_changes(self) -> None:
        """Outputs that are there and differ stay as they are; each is told."""
        for job in list(self.work.iter_to_do()):
            if not self.mirror.checksum and self.work.is_only_unproven(job):
                self.work.settle_current(job)
            elif self._present(job):
                detail = f"{job.path} has changed, and {job.dest_uri} is not to be written over"
                self._give_up(job, "immutable", detail)

    def _present(self, job: Job) -> list[str]:
        """What the job would write over; where that cannot be found out, it is given up, and nothing is."""
        try:
            return self.work.present(job)
        except StorageError as error:
            self._give_up(job, error.reason, one_line(f"what it would write over is not known: {error}"))
            return []

    def _give_up(self, job: Job, reason: str, detail: str) -> None:
        self.work.refuse(job)
        self.tally.add(job, Outcome(job.path, "failed", reason, detail))
        self._announce(job.path, "failed", reason, detail)

    def _release_companions(self) -> None:
        """Take companions off the manifests of outputs that are made anew: the mirror copies them itself.

        Such are outputs that `convert` made; it takes configuration and tokenizer along.
        """
        listed: dict[str, list[str]] = {}
        for job in list(self.work.iter_to_do(copies=False)):
            try:
                if names := self.work.copies_listed(job):
                    listed[manifest_uri(job.dest_uri)] = names
            except StorageError as error:
                self._give_up(job, error.reason, one_line(str(error)))
        if not listed:
            return
        self.task_runs += 1
        failed = release_outputs(self.live.run_id, unexamined(listed))
        for job in list(self.work.iter_to_do(copies=False)):
            if (outcome := failed.get(manifest_uri(job.dest_uri))) is not None:
                self._give_up(job, outcome.reason, outcome.detail)

    def _batches(self) -> Iterable[Work]:
        """Conversions first; copies of companions are small and fill the gaps at the end."""
        for copies, make in ((False, self._convert), (True, self._copy)):
            count, nbytes = self.work.to_do(copies=copies)
            for batch in iter_batches(
                self.work.iter_to_do(copies=copies),
                count,
                nbytes,
                nbytes=lambda job: job.source_size,
                workers=self.runner.width,
                max_batches=MIRROR_BATCHES,
                most=self.runner.batch_count,
                per_worker=self.runner.batches_per_worker,
            ):
                yield make(batch)

    def _copy(self, jobs: Sequence[Job], retry: int = 0, lost: int = 0) -> Work:
        label = self._label(jobs, retry)

        def submit() -> PrefectFuture[Any]:
            return self._submit(copy_batch, label=label, jobs=jobs, options=self.options)

        def then(state: State[Any]) -> Iterable[Work]:
            if self._was_lost(jobs, state, lost):
                yield from (self._copy(part, retry, lost + 1) for part in halves(jobs))
                return
            _, again = self._collect(jobs, state, retry)
            if time.monotonic() > self.indexed + INDEX_SECONDS:
                self.indexed = time.monotonic()
                self._write_index()
            if again:
                yield self._copy(again, retry + 1)

        return Work(submit, then, delay=retry_delay(retry) if retry else 0.0)

    # -- files of DEST ----------------------------------------------------------------------------

    def _back_up(self) -> None:
        """Copy what is written over to the backup place. A job whose file could not be saved is not done."""
        owners = {path: job for job in list(self.work.iter_to_do()) for path in self._present(job)}
        failed = self._each_file(
            back_up_batch, list(owners), "copied", "backed_up", backup=self.mirror.backup_dir
        )
        for job in {owners[path].path: owners[path] for path in failed}.values():
            outcome = next(failed[path] for path in failed if owners[path].path == job.path)
            self._give_up(job, outcome.reason, f"not backed up: {outcome.detail}")

    def _delete_gone(self) -> None:
        """What earlier runs put there and this one would not, if all went well and it is not too much."""
        tally = self.tally
        if self.running.is_stopping:
            return
        self.task_runs += 1
        try:
            found = find_gone(self.live.run_id, tally.source, list(self.mirror.exclude))
        except StorageError as error:
            detail = one_line(f"what is gone from SOURCE is not known: {error}")
            tally.run_problems.append(Problem(tally.dest, error.reason, f"{detail}; nothing was deleted"))
            return
        gone = [item for item in found if not item.kept]
        changed = [item for item in found if item.kept]
        for item in changed[:LOGGED]:
            self.logger.warning("kept %s: %s", item.output, item.kept)
        tally.kept = len(changed)
        if not gone:
            return
        if not tally.is_clean:  # what is known, and still fails, has its outputs planned: they stay
            self.logger.warning(
                "%d outputs are gone from SOURCE; nothing is deleted: there were problems", len(gone)
            )
            tally.kept = len(found)
            return
        if too_many := excess(len(gone), self.mirror.max_delete):
            tally.kept = len(found)
            tally.run_problems.append(Problem(tally.dest, "max_delete", too_many))
            return
        files = list(dict.fromkeys(path for item in gone for path in item.files))
        if self.mirror.backup_dir is not None:
            failed = self._each_file(
                back_up_batch, files, "copied", "backed_up", backup=self.mirror.backup_dir
            )
            if failed:
                tally.kept = len(found)
                first = next(iter(failed.values()))
                tally.run_problems.append(Problem(tally.dest, first.reason, f"not backed up: {first.detail}"))
                return
        failed = self._each_file(delete_batch, files, "deleted", "deleted")
        for path, outcome in failed.items():
            tally.run_problems.append(Problem(f"{tally.dest}/{path}", outcome.reason, outcome.detail))

    def _note_file(self, outcome: Outcome) -> None:
        """A deletion leaves nothing but this trace."""
        if outcome.kind != "deleted":
            return
        if len(self.tally.deleted) < LISTED:
            self.tally.deleted.append(outcome.path)
            self.lines.append(f"deleted {outcome.path}")

    def _each_file(
        self, task: Any, files: Sequence[str], good: str, counter: str, **values: Any
    ) -> dict[str, Outcome]:
        """Have a task do something with files of DEST; count the good outcomes, return the others."""
        failed: dict[str, Outcome] = {}

        def work(part: Sequence[str], retry: int = 0) -> Work:
            def then(state: State[Any]) -> Iterable[Work]:
                if not state.is_completed():
                    lost = f"the task run ended {state.name}: {state.message}"
                    outcomes = [Outcome(path, "failed", "internal_error", lost) for path in part]
                else:
                    outcomes = state.result()
                again = [o.path for o in outcomes if o.transient and retry < RETRIES]
                for outcome in outcomes:
                    if outcome.kind == good:
                        self.tally.files[counter] += 1
                        self._note_file(outcome)
                    elif outcome.reason and outcome.path not in again:
                        failed[outcome.path] = outcome
                self._log_lines()
                if again:
                    yield work(again, retry + 1)

            return Work(
                lambda: self._submit(
                    task, label=f"{len(part)} files", dest=self.tally.dest, files=list(part), **values
                ),
                then,
                delay=retry_delay(retry) if retry else 0.0,
            )

        self._fan_out(work(part) for part in cut(files, len(files), FILES_PER_BATCH, max_batches=50))
        return failed


@flow(
    name="sync",
    flow_run_name="{source} to {dest}",
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_WORKERS),  # type: ignore[arg-type]
    persist_result=False,
)
@described
def sync(
    source: str,
    dest: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    copy_links: bool = False,
    delete: bool = False,
    max_delete: Annotated[int, Field(ge=0)] | None = None,
    checksum: bool = False,
    immutable: bool = False,
    backup_dir: str | None = None,
    format: OutputFormat = "torch",  # noqa: A002 - the name on the command line and in manifests
    layout: Layout = "mirror",
    naming: Naming = "replace",
    select: str | Sequence[str] | None = None,
    flatten: bool = False,
    split: bool = False,
    strip_prefix: str | None = None,
    rename: Sequence[str] = (),
    drop: Sequence[str] = (),
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    tie_by_value: bool = False,
    recipe: str | None = None,
    parts: bool = False,
    on_unsafe: OnUnsafe = "reject",
    verify: VerifyLevel = "checksum",
    file_digest: FileDigest = "sha256",
    provenance: bool = False,
    force: bool = False,
    fail_fast: bool = False,
    runner: RunnerName = "threads",
    runner_address: str | None = None,
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] | None = None,
    max_requests: Annotated[int, Field(ge=1)] = DEFAULT_REQUESTS,
    deadline: str | float | None = None,
    min_success: Annotated[float, Field(gt=0, le=1)] | None = None,
    source_options: str | None = None,
    dest_options: str | None = None,
    run_id: str | None = None,
) -> State[Any]:
    """Make `dest` a mirror of `source`: checkpoints converted, their companions copied.

    Ends Completed, or Failed where anything was rejected, failed, or was not to be changed.
    """
    options = build_options(
        format=format,
        rename=rename,
        drop=drop,
        select=select,
        flatten=flatten,
        split=split,
        strip_prefix=strip_prefix,
        layout=layout,
        dtype=dtype,
        max_shard_size=max_shard_size,
        tie_by_value=tie_by_value,
        recipe=recipe,
        parts=parts,
        on_unsafe=on_unsafe,
        verify=verify,
        file_digest=file_digest,
        provenance=provenance,
    )
    mirror = MirrorSettings(
        delete=delete,
        max_delete=max_delete,
        checksum=checksum,
        immutable=immutable,
        backup_dir=backup_dir,
        exclude=exclude,
    )
    refuse_secrets(source, dest, *([backup_dir] if backup_dir else []))
    settings = RunSettings(
        runner,
        runner_address,
        workers,
        max_requests,
        parse_duration(deadline) if deadline is not None else None,
        source_options,
        dest_options,
    )
    with join_run(run_id or new_run_id(), source_options, dest_options) as live:
        check_mirror(
            source,
            dest,
            delete=delete,
            backup_dir=backup_dir,
            source_options=live.source_options,
            dest_options=live.dest_options,
        )
        with running(live, dest, settings) as run:
            rule = OutputRule(dest, naming, OUTPUT_SUFFIXES[options.format], options.layout)
            options = alone(options)
            problems = list_mirror(
                live.run_id,
                source,
                unexamined(rule),
                unexamined(options),
                list(include),
                list(exclude),
                distrust=checksum,
                copy_links=copy_links,
            )
            if not problems and not work_of(live).count():
                raise UsageError(nothing_below(source, work_of(live).entries, "nothing to mirror"))
            tally = MirrorTally(live.run_id, source, dest, kind="sync", min_success=min_success)
            # What is up to date stays; what is done replaces whatever lies there.
            forced = options.replace(force=force)
            mirroring = Synchronization(run, forced, tally, fail_fast, mirror)
            mirroring.selection = Selection(
                exclude=tuple(exclude), copied=tuple(include), copy_links=copy_links
            )
            return mirroring.carry_out(problems)
