"""What a migration takes over from earlier ones about versions that failed, and what it leaves to later ones.

As `ptbin.runs.remembering` does for checkpoints: the same files below DEST, the same rules for one row. A
version is known by its URI in SOURCE, its state by the registry's own revision of it. The two files lie where
the migration's runs are recorded; they cost two reads and a write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptbin.history.failures import Unconverted, read_ledger
from ptbin.registries import Migration, Version, wanted_names
from ptbin.runs.tally import Tally
from ptbin.stores import place_of

__all__ = ["VersionMemory", "state_of"]


def state_of(version: Version) -> str:
    """The version's content in SOURCE, as one text; equal texts mean equal content."""
    return f"version:{version.fingerprint('')}"


@dataclass(frozen=True, slots=True)
class VersionMemory:
    """Which versions of SOURCE a migration looks at.

    Attributes:
        root: URI of SOURCE.
        include, exclude: globs for names of models.
        versions: `all`, `latest` or `aliased`, of each model.
    """

    root: str
    plan: Migration
    include: Sequence[str]
    exclude: Sequence[str]
    versions: str

    def selection(self) -> dict[str, Any]:
        """For the run record: what `ptbin status` asks about."""
        return {"include": list(self.include), "exclude": list(self.exclude), "versions": self.versions}

    def open_ledger(self, tally: Tally, dest_options: Mapping[str, Any] | None = None) -> None:
        """Give the tally what earlier migrations failed at.

        Raises:
            PtbinError: what is acknowledged cannot be read.
        """
        tally.ledger = read_ledger(
            place_of(tally.place, dest_options), run_id=tally.run_id, root=self.root, now=tally.ledger.now
        )

    def close_ledger(self, tally: Tally, untried_paths: Collection[str]) -> list[Unconverted] | None:
        """What is to be stored at the end of the run; None where nothing was and nothing is to be."""
        ledger = tally.ledger
        looked_at = {step.version.uri: step.version.path for step in self.plan.steps()}
        unseen = {plan.model.name for plan in self.plan.models if plan.problem}

        def is_settled(row: Unconverted) -> bool:
            if (path := looked_at.get(row.source)) is not None:
                return path not in untried_paths
            model = row.path.rpartition("/")[0]
            is_in_view = row.root == self.root and self.versions == "all" and model not in unseen
            return is_in_view and wanted_names(self.include, self.exclude, model)  # so it is gone

        rows = ledger.close(is_settled)
        return rows if rows or ledger.before else None
