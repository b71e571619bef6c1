"""What every run over a whole store keeps while it goes on, and leaves in DEST.

The index of finished work, written in segments on the way, for a run may be killed; what is not converted,
for later runs; the run record. Nothing here knows how the jobs are done: threads (`ptbin.runs.directories`)
and Prefect's flows settle them. Index and ledger only spare work: that one cannot be written is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ptbin.catalog.finished import FinishedRow, write_segment
from ptbin.catalog.jobs import Job, Problem
from ptbin.catalog.plan import Plan
from ptbin.errors import PtbinError, StorageError
from ptbin.history.failures import write_unconverted
from ptbin.runs.ending import Do, end_run
from ptbin.runs.outcomes import Outcome, one_line
from ptbin.runs.remembering import Memory
from ptbin.runs.tally import Tally

FULL_AFTER = 3
"""After that many failures for want of room a run ends: each of the rest would be read whole to fail so."""
FULL = "there is no room left in DEST; free some, then run again"
SEGMENT_ROWS = 5_000


class Account:
    """The account of one run.

    Args:
        began: when the run did, by `time.monotonic`.
        do: how DEST's own files are written.
        warn: gets a line where that failed and nothing is lost by it.
    """

    def __init__(
        self,
        plan: Plan,
        tally: Tally,
        memory: Memory,
        *,
        began: float,
        do: Do = lambda _, write: write(),
        warn: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.plan = plan
        self.tally = tally
        self.settled: set[str] = set()
        """Paths of what has its final outcome."""
        self._memory: Memory | None = memory
        self._began = began
        self._do = do
        self._warn = warn
        self._full = 0
        self._has_counted = False
        self._rows: list[FinishedRow] = []
        self._segments = 0
        self._dest = plan.sides.dest_at(tally.place)

    def open(self) -> list[Outcome]:
        """Take over what earlier runs failed at; what the listing refuses, in the plan's order.

        Where it cannot be read what failed, nothing is known, and the run fails.
        """
        assert self._memory is not None
        try:
            self._memory.open(self.tally)
        except PtbinError as error:
            self._memory = None
            self.tally.run_problems.append(Problem(self.tally.dest, error.reason, one_line(str(error))))
        self.tally.skipped.update(self.plan.work.entries.counts)
        return self.tally.add_collisions(self.plan.problems)

    def count_untouched(self) -> None:
        """Count, once, what is not to be done: what is up to date or, by its name, left alone."""
        if not self._has_counted:
            self._has_counted = True
            self.tally.add_untouched(self.plan.work)

    def count_rest(self) -> None:
        """At the run's end count what it did not get to."""
        self.count_untouched()
        self.tally.add_rest(self.plan.work, self.settled)

    def settle(self, job: Job, outcome: Outcome) -> Outcome:
        """A job has its final outcome."""
        self._full += outcome.is_full
        self.settled.add(job.path)
        facts = outcome.converted
        if facts is not None and facts.index_row is not None:
            self.remember_at(job, facts.index_row)
        return self.tally.add(job, outcome)

    @property
    def remembers(self) -> bool:
        """Whether it is known what earlier runs failed at."""
        return self._memory is not None

    @property
    def is_full(self) -> bool:
        """Whether DEST has no room left."""
        return self._full >= FULL_AFTER

    def remember_at(self, job: Job, row: FinishedRow) -> None:
        """A row for the index of finished work, of a job."""
        self.remember([replace(row, manifest=self.plan.work.relative_manifest(job))])

    def remember(self, rows: Iterable[FinishedRow]) -> None:
        """Rows for the index of finished work, written in segments."""
        self._rows.extend(rows)
        if len(self._rows) >= SEGMENT_ROWS:
            self.write_index()

    def write_index(self) -> None:
        """Write what there is to remember."""
        rows, self._rows = self._rows, []
        if rows:
            self._segments += 1
            name = f"{self.tally.run_id}-{self._segments:04d}"
            self._try("write index", "index of finished work", lambda: write_segment(self._dest, name, rows))

    def close(self, *, stopped: str = "", merges: bool = True, **prefect: Any) -> dict[str, Any]:
        """Leave index, ledger and record; the summary, as `end_run` returns it.

        Args:
            stopped: why the run was stopped; empty where nothing but an interrupt did.
            merges: whether an index of many segments is put into one.
            prefect: as `end_run` takes it.
        """
        tally, memory = self.tally, self._memory
        self.write_index()
        if merges and self.plan.has_many_segments:
            merged = f"{tally.run_id}-merged"
            self._try("merge index", "index of finished work", lambda: self.plan.merge_index(merged))
        if stopped:
            tally.run_problems.append(Problem(tally.dest, "run_stopped", stopped))
        if memory is not None and (rows := memory.close(tally, self.settled)) is not None:
            left = rows
            what = "what was not converted"
            self._try(f"write {what}", what, lambda: write_unconverted(self._dest, left))
        return end_run(
            tally,
            self.plan.request.making,
            began=self._began,
            selection=memory.selection() if memory is not None else None,
            do=self._do,
            sides=self.plan.sides,
            **prefect,
        )

    def _try(self, name: str, what: str, write: Callable[[], None]) -> None:
        try:
            self._do(name, write)
        except StorageError as error:
            self._warn(f"{what}: {one_line(str(error))}")
