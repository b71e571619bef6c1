"""What a run shows in the Prefect UI: one table artifact, problems first.

The key is the same for every run of a flow, so the UI keeps their history under it. Prefect accepts
tables of several thousand rows (5,000 measured); the rest is in the run record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flows.tally import Entry
from flows.units import format_nbytes, short_detail

__all__ = ["MAX_ROWS", "conversion_rows", "publish_table", "verification_rows"]

MAX_ROWS = 5_000


def conversion_rows(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """One row per checkpoint: problems first, then by path."""
    ordered = sorted(entries, key=lambda entry: (not entry.reason, entry.path))
    return [
        {
            "checkpoint": entry.path,
            "outcome": entry.outcome.replace("_", " "),
            "reason": entry.reason,
            "detail": short_detail(entry.path, entry.detail),
            "source size": format_nbytes(entry.nbytes),
            "output size": format_nbytes(sum(output.size for output in entry.converted.outputs))
            if entry.converted
            else "",
            "tensors": entry.converted.tensors if entry.converted else "",
        }
        for entry in ordered
    ]


def verification_rows(verified: Iterable[str], issues: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per issue, then one per proven manifest."""
    rows = [
        {"uri": issue["uri"], "outcome": "failed", "reason": issue["reason"], "detail": issue["detail"]}
        for issue in issues
    ]
    rows += [{"uri": uri, "outcome": "proven", "reason": "", "detail": ""} for uri in sorted(verified)]
    return rows


def publish_table(key: str, rows: Sequence[dict[str, Any]], description: str) -> None:
    """Store the table with the current flow run; `key` of lower-case letters, digits and dashes."""
    from prefect.artifacts import create_table_artifact

    if len(rows) > MAX_ROWS:
        description += f"\n\nThe first {MAX_ROWS} of {len(rows)} rows."
    create_table_artifact(key=key, table=list(rows[:MAX_ROWS]), description=description)
