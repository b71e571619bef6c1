"""`ptbin acknowledge`: say of failures that they are known, until a day; no Prefect, no server."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

from flows.cli.command import Shared, command
from ptbin.errors import UsageError
from ptbin.stores import public_uri
from ptbin.values.options import Option

EPILOG = """\b
Examples:
  ptbin acknowledge weights/ run3/cut.pt --reason 'truncated, trained again' --until 2026-12-31
  ptbin acknowledge s3://models/weights a.pt b.pt --reason 'issue 412' --until 2027-01-15

PATH is a checkpoint that failed in an earlier run, relative to SOURCE, or its URI. Until that day (UTC) a run
still tries it, and no longer fails because of it, as long as neither the file nor the reason of the failure
changes. The list lies in DEST/_ptbin/known.json; delete an entry there to take it back.

Exit status: 0 acknowledged; 2 the call was wrong, or nothing fails at a PATH: nothing was written."""


OPTIONS = (
    Option("reason", "Why it is no longer news; reports show it.", required=True, metavar="TEXT"),
    Option("until", "The last day it holds.", kind="day", required=True, metavar="DATE"),
)


@command("acknowledge", ["dest"], OPTIONS, EPILOG)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
def acknowledge_command(dest: str, paths: Sequence[str], asked: dict[str, Any], shared: Shared) -> int:
    """Mark failures in DEST as known, so that they no longer fail a run."""
    until: datetime = asked["until"]
    from ptbin.history.failures import acknowledge
    from ptbin.stores import place_of

    today = datetime.now(UTC).date()
    if until.date() < today:
        raise UsageError(f"--until {until:%Y-%m-%d} is over; today is {today} (UTC)")
    because = " ".join(asked["reason"].split())
    if not because:
        raise UsageError("--reason is empty; readers of the report want to know why this is not news")
    day = f"{until:%Y-%m-%d}"
    place = place_of(dest, shared.dest_options)
    failures = acknowledge(place, paths, because=because, until=day, today=today)
    known = [{"path": row.path, "source": row.source, "reason": row.reason} for row in failures]
    lines = [f"known until {day}: {row.path}: {row.reason} since {row.since[:10]}" for row in failures]
    shared.answer(lambda: {"dest": public_uri(dest), "until": day, "known": known}, lines)
    return 0
