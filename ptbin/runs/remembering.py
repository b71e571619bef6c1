"""What a run takes over from earlier ones about failures, and what it leaves to later ones.

The rules for one row lie in `ptbin.history.failures`; a `Memory` says what a run knows of a row that it did
not fail at itself: whether it is settled, gone from SOURCE, or was not looked at. Two reads and a write.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptbin.catalog.globs import root_of
from ptbin.catalog.jobtable import CURRENT, LEFT_ALONE, TO_DO
from ptbin.catalog.plan import Plan
from ptbin.history.failures import Unconverted, read_ledger
from ptbin.registries import Migration, Version, wanted_names
from ptbin.runs.tally import Tally


class Memory(ABC):
    """What a run with a plan remembers: of checkpoints, or of versions of models."""

    plan: Plan

    @property
    @abstractmethod
    def root(self) -> str:
        """URI of SOURCE."""

    @abstractmethod
    def selection(self) -> dict[str, Any]:
        """For the run record: which of SOURCE the run looks at, which `ptbin status` asks about."""

    @abstractmethod
    def _is_settled(self, row: Unconverted, tally: Tally, settled: Collection[str]) -> bool:
        """Whether an earlier row, which this run did not come upon, is over."""

    def open(self, tally: Tally) -> None:
        """Give the tally what earlier runs failed at; after the listing, which shows whether there is any.

        Raises:
            PtbinError: what is acknowledged cannot be read.
        """
        tally.ledger = read_ledger(
            self.plan.sides.dest_at(tally.place),
            run_id=tally.run_id,
            root=self.root,
            now=tally.ledger.now,
            there=self.plan.work.own_files,
        )

    def close(self, tally: Tally, settled: Collection[str]) -> list[Unconverted] | None:
        """What is to be stored at the end of the run; None where nothing was and nothing is to be.

        `settled`: paths of what has its final outcome.
        """
        rows = tally.ledger.close(lambda row: self._is_settled(row, tally, settled))
        return rows if rows or tally.ledger.before else None


@dataclass(frozen=True, slots=True)
class CheckpointMemory(Memory):
    """Of a run whose jobs are the checkpoints and files of its plan."""

    plan: Plan

    @property
    def root(self) -> str:
        return root_of(self.plan.request.source, self.plan.sides.source_at)

    def selection(self) -> dict[str, Any]:
        return self.plan.request.selection()

    def _is_settled(self, row: Unconverted, tally: Tally, settled: Collection[str]) -> bool:
        states = self.plan.work.states_of(row.source)
        if not states:
            return row.root == tally.ledger.root and self.plan.request.takes(row.path)
        return all(
            state in (CURRENT, LEFT_ALONE) or (state == TO_DO and row.path in settled) for state in states
        )


@dataclass(frozen=True, slots=True)
class VersionMemory(Memory):
    """Of a migration: a version is known by its URI in SOURCE, its state by the registry's revision of it.

    Attributes:
        source: URI of SOURCE.
        asked: what the migration was asked for: `include` and `exclude`, globs for names of models,
            `versions` (`all`, `latest` or `aliased`, of each model), and the layouts of both sides.
    """

    plan: Plan
    source: str
    migration: Migration
    asked: Mapping[str, Any]

    @property
    def root(self) -> str:
        return self.source

    def selection(self) -> dict[str, Any]:
        names = ("include", "exclude", "versions", "source_layout", "layout")
        return {name: _plain(self.asked[name]) for name in names}

    def _is_settled(self, row: Unconverted, tally: Tally, settled: Collection[str]) -> bool:
        del tally
        for step in self.migration.steps():
            if step.version.uri == row.source:
                return step.action != "migrate" or step.version.path in settled
        model = row.path.rpartition("/")[0]
        unseen = {plan.model.name for plan in self.migration.models if plan.problem}
        is_in_view = row.root == self.root and self.asked["versions"] == "all" and model not in unseen
        # In view, and not there: it is gone.
        return is_in_view and wanted_names(self.asked["include"], self.asked["exclude"], model)


def _plain(value: str | Sequence[str] | None) -> str | list[str] | None:
    return value if value is None or isinstance(value, str) else list(value)


def state_of(version: Version) -> str:
    """The version's content in SOURCE, as one text; equal texts mean equal content."""
    return f"version:{version.fingerprint('')}"
