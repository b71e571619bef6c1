"""What a run shows in the Prefect UI: its progress, a table with problems first, a link to the report.

The key is the same for every run of a flow, so the UI keeps their history under it. Prefect accepts
tables of several thousand rows (5,000 measured); the rest is in the run record.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from flows.tally import Entry
from flows.units import format_nbytes, short_detail

__all__ = [
    "MAX_ROWS",
    "ProgressArtifact",
    "conversion_rows",
    "publish_link",
    "publish_table",
    "verification_rows",
]

MAX_ROWS = 5_000
UPDATE_SECONDS = 4.0
"""Between two updates of the progress, each 15 to 75 ms of waiting for the server."""


class ProgressArtifact:
    """How far a run is, in per cent of its files. Made at the first update: short runs need none."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._count = 0
        self._id: Any = None
        self._told_at = time.monotonic()

    def begin(self, count: int) -> None:
        """So many files there are to do."""
        self._count = count
        self._told_at = time.monotonic()

    def update(self, done: int, text: str) -> None:
        """So many are done; most calls cost nothing."""
        if self._count and time.monotonic() >= self._told_at + UPDATE_SECONDS:
            self._told_at = time.monotonic()
            self._show(min(100.0, 100.0 * done / self._count), f"{done} of {self._count} files: {text}")

    def end(self) -> None:
        if self._id is not None:
            self._show(100.0, "")

    def _show(self, percent: float, text: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._id is None:
            self._id = create_progress_artifact(percent, key=self._key, description=text)
        else:
            update_progress_artifact(self._id, percent, description=text or None)


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


def publish_link(key: str, uri: str, text: str) -> None:
    """A link to `uri`, a path or URL."""
    from prefect.artifacts import create_link_artifact

    link = f"file://{uri}" if uri.startswith("/") else uri
    create_link_artifact(link, link_text=text, key=key, description=f"[{text}]({link})\n\n`{uri}`")


def publish_table(key: str, rows: Sequence[dict[str, Any]], description: str) -> None:
    """Store the table with the current flow run; `key` of lower-case letters, digits and dashes."""
    from prefect.artifacts import create_table_artifact

    if len(rows) > MAX_ROWS:
        description += f"\n\nThe first {MAX_ROWS} of {len(rows)} rows."
    create_table_artifact(key=key, table=list(rows[:MAX_ROWS]), description=description)
