"""What a run takes over from earlier ones about failures, and what it leaves to later ones.

The rules for one row lie in `ptbin.history.failures`; here is what a run with a work list knows of a row that
it did not fail at itself: whether it is settled, gone from SOURCE, or was not looked at.
"""

from __future__ import annotations

from collections.abc import Collection

from ptbin.catalog.globs import root_of
from ptbin.catalog.jobtable import CURRENT, LEFT_ALONE, TO_DO
from ptbin.catalog.plan import Plan
from ptbin.history.failures import Unconverted, read_ledger
from ptbin.runs.tally import Tally
from ptbin.stores import place_of

__all__ = ["close_ledger", "open_ledger"]


def open_ledger(
    tally: Tally,
    plan: Plan,
) -> None:
    """Give the tally what earlier runs failed at; after the listing, which says whether there is anything.

    Raises:
        PtbinError: what is acknowledged cannot be read.
    """
    tally.ledger = read_ledger(
        place_of(tally.dest, plan.sides["dest_options"]),
        run_id=tally.run_id,
        root=root_of(tally.source, plan.sides["source_options"]),
        now=tally.ledger.now,
        there=plan.work.own_files,
    )


def close_ledger(tally: Tally, plan: Plan, settled_paths: Collection[str]) -> list[Unconverted] | None:
    """What is to be stored at the end of the run; None where nothing was and nothing is to be."""
    ledger, work, request = tally.ledger, plan.work, plan.request

    def is_settled(row: Unconverted) -> bool:
        states = work.states_of(row.source)
        if not states:
            return row.root == ledger.root and request.takes(row.path)
        return all(
            state in (CURRENT, LEFT_ALONE) or (state == TO_DO and row.path in settled_paths)
            for state in states
        )

    rows = ledger.close(is_settled)
    return rows if rows or ledger.before else None
