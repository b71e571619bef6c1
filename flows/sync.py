"""The sync flow: DEST becomes a mirror of SOURCE, its checkpoints as weights, its other files as they are.

Convert what is new or changed, copy companions along, and, where asked, delete what earlier runs put into
DEST and SOURCE no longer has. Nothing is deleted when anything went wrong, and never a file that ptbin did
not put there. What is written over or deleted goes to the backup place first, if there is one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from flows.access import Running
from flows.batches import cut
from flows.conversion import LOGGED, Conversion, carry_out
from flows.forms import PLACES
from flows.options import SYNC
from flows.requests import Text, sync_request
from flows.run_flow import run_flow
from flows.stages import Stage, count_of
from ptbin.catalog import Job, Problem
from ptbin.catalog.comparing import release_companions
from ptbin.catalog.plan import plan_deletions
from ptbin.errors import StorageError
from ptbin.manifests.manifest import manifest_uri
from ptbin.runs.outcomes import Outcome, one_line, outcome_of_error
from ptbin.runs.tally import MAX_LISTED_ROWS
from tasks.batches import BatchTask
from tasks.mirroring import back_up_batch, compare_batch, copy_batch, delete_batch
from tasks.steps import step

FILES_PER_BATCH = 200
MIRROR_BATCHES = 80
"""Of comparisons, conversions and copies each; with backups and deletions about 500 task runs at most."""


INDEX_SECONDS = 10.0
"""How often the index of finished work is written while files are copied: only it vouches for copies."""


class Synchronization(Conversion):
    """A conversion that also compares, copies, backs up and deletes."""

    def __init__(self, run: Running) -> None:
        super().__init__(run)
        self.request = self.plan.request
        self.indexed = time.monotonic()

    def run(self) -> None:
        if self.request.compares:
            self._compare_all()
        self._give_up_all(self.plan.hold_back())
        self._back_up()
        if self.request.options.layout == "hf":
            self._release_companions()
        super().run()
        if self.request.deletes:
            self._delete_gone()

    # -- what is to be done -----------------------------------------------------------------------

    def _compare_all(self) -> None:
        """By content: what would come out the same is not to be done."""
        values = {"options": self.options}
        stage = Stage(compare_batch, "compare", values, self._settle_current, self._label)
        self._apart(stage, list(self._batches(MIRROR_BATCHES)))

    def _settle_current(self, compared: Sequence[tuple[Job, Outcome]]) -> None:
        for job, outcome in compared:
            if outcome.kind != "up_to_date":
                continue
            self.work.settle_current(job)
            if outcome.converted is not None and outcome.converted.index_row is not None:
                self.account.remember_at(job, outcome.converted.index_row)

    def _give_up_all(self, refused: Iterable[tuple[Job, Problem]]) -> None:
        for job, problem in refused:
            self._give_up(job, problem.reason, one_line(problem.detail))

    def _give_up(self, job: Job, reason: str, detail: str) -> None:
        self.work.refuse(job)
        self._report(self.tally.add(job, Outcome(job.path, "failed", reason, detail)))

    def _release_companions(self) -> None:
        """Take companions off the manifests of outputs that are made anew: the mirror copies them itself.

        Such are outputs that `convert` made; it takes configuration and tokenizer along.
        """
        failed: list[tuple[Job, Outcome]] = []

        def release() -> None:
            for job in jobs:
                self.live.tick()
                try:
                    if names := self.work.copies_listed(job):
                        release_companions(self.live.sides.dest_at(manifest_uri(job.dest_uri)), names)
                except Exception as error:  # noqa: BLE001 - what is wrong with one must not stop the others
                    failed.append((job, outcome_of_error(job.path, error)))

        if jobs := list(self.work.iter_to_do(copies=False)):
            step(self.live, "release companions", release, retried=False)
        for job, outcome in failed:
            self._give_up(job, outcome.reason, outcome.detail)

    def _parts(self) -> Sequence[tuple[Stage, Iterable[Sequence[Job]]]]:
        """Conversions first; copies of companions are small and fill the gaps at the end."""
        copy = Stage(copy_batch, "copy", {"options": self.options}, self._settle_copies, self._label)
        return [
            (self._making(), self._batches(MIRROR_BATCHES, copies=False)),
            (copy, self._batches(MIRROR_BATCHES, copies=True)),
        ]

    def _settle_copies(self, final: Sequence[tuple[Job, Outcome]]) -> None:
        self._settle_all(final)
        if time.monotonic() > self.indexed + INDEX_SECONDS:
            self.indexed = time.monotonic()
            self.account.write_index()

    # -- files of DEST ----------------------------------------------------------------------------

    def _back_up(self) -> None:
        """Copy what is written over to the backup place. A job whose file could not be saved is not done."""
        owners, refused = self.plan.backups()
        self._give_up_all(refused)
        if not owners:
            return
        failed = self._save(list(owners))
        for job, outcome in {owners[path].path: (owners[path], failed[path]) for path in failed}.values():
            self._give_up(job, outcome.reason, f"not backed up: {outcome.detail}")

    def _save(self, files: Sequence[str]) -> dict[str, Outcome]:
        return self._each_file(
            back_up_batch, "back up", files, "copied", "backed_up", backup=self.request.backup_dir
        )

    def _delete_gone(self) -> None:
        """What earlier runs put there and this one would not, if all went well and it is not too much."""
        tally = self.tally
        if self.running.is_stopping:
            return
        try:
            found = step(self.live, "find what is gone", lambda: list(self.plan.iter_gone(self.live.tick)))
        except StorageError as error:
            detail = one_line(f"what is gone from SOURCE is not known: {error}")
            tally.run_problems.append(Problem(tally.dest, error.reason, f"{detail}; nothing was deleted"))
            return
        for item in [item for item in found if item.kept][:LOGGED]:
            self.logger.warning("kept %s: %s", item.output, item.kept)
        deletions = plan_deletions(found, is_clean=tally.is_clean, most=self.request.max_delete)
        tally.kept = len(deletions.kept)
        if deletions.problem:
            tally.run_problems.append(Problem(tally.dest, "max_delete", deletions.problem))
        elif not deletions.files and (count := sum(not item.kept for item in found)):
            # What is known, and still fails, has its outputs planned: they stay.
            self.logger.warning(
                "%d outputs are gone from SOURCE; nothing is deleted: there were problems", count
            )
        if self.request.backup_dir is not None and (failed := self._save(deletions.files)):
            tally.kept = len(found)
            first = next(iter(failed.values()))
            tally.run_problems.append(Problem(tally.dest, first.reason, f"not backed up: {first.detail}"))
            return
        failed = self._each_file(delete_batch, "delete", deletions.files, "deleted", "deleted")
        for path, outcome in failed.items():
            tally.run_problems.append(Problem(f"{tally.dest}/{path}", outcome.reason, outcome.detail))

    def _note_file(self, outcome: Outcome) -> None:
        """A deletion leaves nothing but this trace."""
        if outcome.kind != "deleted":
            return
        if len(self.tally.deleted) < MAX_LISTED_ROWS:
            self.tally.deleted.append(outcome.path)
            self.lines.append(f"deleted {outcome.path}")

    def _each_file(
        self, task: BatchTask, title: str, files: Sequence[str], good: str, counter: str, **values: Any
    ) -> dict[str, Outcome]:
        """Have a task do something with files of DEST; count the good outcomes, return the others."""
        failed: dict[str, Outcome] = {}
        if not files:
            return failed

        def settle(final: Sequence[tuple[str, Outcome]]) -> None:
            for path, outcome in final:
                if outcome.kind == good:
                    self.tally.files[counter] += 1
                    self._note_file(outcome)
                elif outcome.reason:
                    failed[path] = outcome
            self._log_lines()

        stage = Stage(task, title, {"dest": self.tally.dest, **values}, settle, count_of("files"))
        self._apart(stage, cut(files, len(files), FILES_PER_BATCH, max_batches=50))
        return failed


@run_flow(PLACES, SYNC)
def sync(source: Text, dest: Text, **asked: Any) -> Any:
    """Make `dest` a mirror of `source`: checkpoints converted, their companions copied.

    Returns its `RunResult`; ends Failed (`RunFailedError`) where anything was rejected, failed, or was not to
    be changed.
    """
    return carry_out(sync_request(source, dest, asked), asked, Synchronization)
