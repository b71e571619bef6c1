"""The plan of a run over a whole store: one value, made in one place.

`make` lists both sides; the other methods settle what listings cannot know, in this order: what the index of
finished work does not know (`settle_unknown`), what has the same content (`compare_all`), what must not be
changed (`hold_back`). What is left in `work` is what the run does. A run hands these steps to its workers
where they take long; a dry run (`ptbin.runs.dry_run`) takes them here. The rules are the same.

Nothing is written but, where the caller says so, notes in manifests. Costs: see each method; what must be
remembered of millions of checkpoints lies on disk (`ptbin.catalog.worklist`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ptbin.catalog.checks import refuse_bytes
from ptbin.catalog.comparing import compare_job
from ptbin.catalog.entries import nothing_below
from ptbin.catalog.finished import FinishedRow, read_finished, write_segment
from ptbin.catalog.jobs import Job, Problem
from ptbin.catalog.mirroring import Gone, iter_gone
from ptbin.catalog.request import RunRequest
from ptbin.catalog.worklist import WorkList
from ptbin.errors import PtbinError, StorageError, UsageError
from ptbin.stores import NO_OPTIONS, Sides

WIDTH = 8
"""How many small answers are waited for side by side."""
ASKED_AT_ONCE = 500
MERGED_SEGMENTS = 16
"""Where a run finds that many segments of the index, it puts one in their place."""

Tick = Callable[[], object]


class Plan:
    """What a run is to do, in a temporary database: close it.

    Attributes:
        work: the jobs, with the state that each is in.
        problems: what cannot be done at all; empty until the plan is made.
        damaged: by URI of an output, the files that `compare_all` found damaged; a run notes them instead.
    """

    def __init__(self, request: RunRequest, sides: Sides = NO_OPTIONS) -> None:
        if request.kind != "migrate":  # whose SOURCE is a registry
            refuse_bytes(sides.source_at(request.source))
        dest = sides.dest_at(request.dest)
        refuse_bytes(dest)
        self.request = request
        self.sides = sides
        self.work = WorkList(dest)
        self.problems: list[Problem] = []
        self.is_made = False
        self.damaged: dict[str, Mapping[str, Any]] = {}

    def close(self) -> None:
        self.work.close()

    def make(self, tick: Tick = lambda: None, on_new: Callable[[Job], bool] | None = None) -> None:
        """List both sides and decide what becomes of each checkpoint. Nothing is done where that is done.

        `tick` is called now and then, and may raise; `on_new` as in `WorkList.plan`.

        Raises:
            NotFoundInStoreError, StorageError: from the stores; it may be tried again.
        """
        if self.is_made:
            return
        source_at = self.sides.source_at
        self.problems = self.work.plan(self.request, source_at=source_at, tick=tick, on_new=on_new)
        self.is_made = True

    def refuse_nothing(self) -> None:
        """Raises UsageError where SOURCE holds nothing that this run could do."""
        if self.request.named is None and not self.problems and not self.work.count():
            raise UsageError(nothing_below(self.request.source, self.work.entries, self.request.nothing))

    # -- what listings cannot know -----------------------------------------------------------------

    def read_finished(self, job: Job) -> FinishedRow | None:
        """What the job's manifest says now; None: nothing. One read; of a copy, its content is compared.

        Raises:
            StorageError: the store failed.
        """
        return read_finished(job, self.work.relative_manifest(job), self.request.planning, self.sides)

    def settle_unknown(self, tick: Tick = lambda: None) -> list[FinishedRow]:
        """Ask the manifests that the index of finished work does not know; what it is to know of them.

        Where one cannot be read, its job is to be done: the conversion meets the same problem and reports it.
        """

        def read(job: Job) -> FinishedRow | None:
            try:
                return self.read_finished(job)
            except PtbinError:
                return None

        rows: list[FinishedRow] = []
        left = self.work.iter_to_ask()
        with ThreadPoolExecutor(WIDTH) as pool:
            while jobs := list(islice(left, ASKED_AT_ONCE)):
                tick()
                found = [row for row in pool.map(read, jobs) if row is not None]
                rows += self.work.answer(jobs, found, self.request.planning)
        return rows

    def compare_all(self) -> None:
        """Settle by content what would come out the same. Reads sources and outputs, and writes nothing."""

        def compare(job: Job) -> bool:
            def note(files: Mapping[str, Any]) -> None:
                self.damaged[job.dest_uri] = files

            return compare_job(job, self.request.making, self.sides, on_damage=note) is not None

        with ThreadPoolExecutor(WIDTH) as pool:
            jobs = list(self.work.iter_to_do())
            for job, is_same in zip(jobs, pool.map(compare, jobs), strict=True):
                if is_same:
                    self.work.settle_current(job)

    def hold_back(self) -> Iterator[tuple[Job, Problem]]:
        """Refuse the jobs that would change what an immutable mirror holds; none, where it is not one."""
        if not self.request.immutable:
            return
        for job in list(self.work.iter_to_do()):
            if not self.request.compares and self.work.is_only_unproven(job):
                self.work.settle_current(job)
                continue
            present, problem = self._present(job)
            if present:
                detail = f"{job.path} has changed, and {job.dest_uri} is not to be written over"
                problem = Problem(job.source_uri, "immutable", detail)
            if problem is not None:
                self.work.refuse(job)
                yield job, problem

    # -- the index of finished work ------------------------------------------------------------------

    @property
    def has_many_segments(self) -> bool:
        """Whether the index has enough segments for one to take their place."""
        return len(self.work.segments()) >= MERGED_SEGMENTS

    def merge_index(self, name: str) -> None:
        """Put one segment in the place of all that were read, where they are many. What another run added
        meanwhile stays.

        Nothing depends on it: where it fails half-way, some rows are there twice.

        Raises:
            StorageError: the store failed.
        """
        if not self.has_many_segments:
            return
        write_segment(self.work.dest, name, self.work.iter_finished())
        for path in self.work.segments():
            (self.work.dest / path).delete()

    # -- files of DEST -------------------------------------------------------------------------------

    def backups(self) -> tuple[dict[str, Job], list[tuple[Job, Problem]]]:
        """Paths below DEST of what is written over, with the job that does it, where they are backed up.

        A job of which that cannot be found out is refused, with its problem.
        """
        owners: dict[str, Job] = {}
        refused = []
        if self.request.backup_dir is not None:
            for job in list(self.work.iter_to_do()):
                present, problem = self._present(job)
                owners.update(dict.fromkeys(present, job))
                if problem is not None:
                    self.work.refuse(job)
                    refused.append((job, problem))
        return owners, refused

    def _present(self, job: Job) -> tuple[list[str], Problem | None]:
        try:
            return self.work.present(job), None
        except StorageError as error:
            detail = f"what it would write over is not known: {error}"
            return [], Problem(job.source_uri, error.reason, detail)

    def iter_gone(self, tick: Tick = lambda: None) -> Iterator[Gone]:
        """What earlier runs made of SOURCE and this one would not, as `mirroring.iter_gone`."""
        source = self.sides.source_at(self.request.source)
        return iter_gone(self.work, source, exclude=self.request.exclude, tick=tick)


@dataclass(frozen=True, slots=True)
class Deletions:
    """What a mirror deletes, in this order, and what it keeps (outputs); paths below DEST.

    `problem`: why nothing is deleted that is gone, where that is a problem.
    """

    files: tuple[str, ...] = ()
    kept: tuple[Gone, ...] = ()
    problem: str = ""


def plan_deletions(found: Sequence[Gone], *, is_clean: bool, most: int | None) -> Deletions:
    """Of what is gone from SOURCE: everything, unless something went wrong, or it is too much. Pure."""
    gone = [item for item in found if not item.kept]
    if not gone or not is_clean:
        return Deletions(kept=tuple(found))
    if most is not None and len(gone) > most:
        problem = f"{len(gone)} outputs are gone from SOURCE, more than the {most} allowed; none was deleted"
        return Deletions(kept=tuple(found), problem=problem)
    files = tuple(dict.fromkeys(path for item in gone for path in item.files))
    return Deletions(files, tuple(item for item in found if item.kept))
