"""What a run's record says of where it stood: machine, version, whole places, and the runs before it.

The history is handed on: each record holds the last `KEPT_RUNS` runs of its flow and SOURCE into its DEST,
so that one listing and the head of one earlier record are all that it costs. What cannot be read is left out.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from ptbin.catalog.globs import root_of
from ptbin.errors import PtbinError
from ptbin.history.records import RecordedRun, iter_runs
from ptbin.runs.tally import Tally
from ptbin.stores import NO_OPTIONS, Sides, public_uri
from ptbin.version import __version__

KEPT_RUNS = 30
LOOKED_AT = 10
"""How many earlier runs are looked at to find one of the same flow and SOURCE."""
COUNTS = ("converted", "copied", "up_to_date", "rejected", "failed", "known", "new", "resolved", "seconds")


def facts_of_run(
    tally: Tally, sides: Sides = NO_OPTIONS, *, prefect_url: str | None = None
) -> dict[str, Any]:
    """Fields for the record of a run that is about to end; `prefect_url` is its page, if it has one."""
    previous = _previous(tally, sides)
    history: list[Any] = []
    if previous is not None:
        before = previous.facts.get("history")
        history = [row for row in before if isinstance(row, dict)] if isinstance(before, list) else []
        history = [*history, _row(previous)][-KEPT_RUNS:]
    return {
        "host": socket.gethostname(),
        "version": __version__,
        "source_uri": _whole(tally.source, lambda source: root_of(source, sides.source_at)),
        "dest_uri": _whole(tally.dest, lambda dest: sides.dest_at(dest).uri),
        "prefect_url": prefect_url,
        "previous_run": previous.run_id if previous is not None else None,
        "history": history,
    }


def _previous(tally: Tally, sides: Sides) -> RecordedRun | None:
    try:
        for run in iter_runs(sides.dest_at(tally.place), last=LOOKED_AT):
            is_same = (run.text("kind"), run.text("source")) == (tally.kind, tally.source)
            if not run.problem and is_same and run.run_id != tally.run_id:
                return run
    except PtbinError:
        pass
    return None


def _row(run: RecordedRun) -> dict[str, Any]:
    counts = {name: run.number(name) for name in COUNTS if run.number(name)}
    return {"run_id": run.run_id, "began": run.began, "succeeded": run.succeeded, **counts}


def _whole(place: str, uri_of: Callable[[str], str]) -> str:
    """The place as a URI or absolute path, without secrets."""
    try:
        return public_uri(uri_of(place))
    except PtbinError:
        return place
