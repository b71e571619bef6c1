"""What a run shows in the Prefect UI: its progress, a table with problems first, the essence of the report.

The key is the same for every run of a flow, so the UI keeps their history under it. Prefect accepts
tables of several thousand rows (5,000 measured); the rest is in the run record.

No work depends on this: a separate thread sends it, what cannot be sent is logged once, and the
end of a run waits for it for `END_SECONDS` and no longer.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flows.prefect.undocumented import settings_with
from ptbin.errors import short_detail
from ptbin.runs.outcomes import Outcome
from ptbin.runs.units import format_nbytes

MAX_ROWS = 5_000
UPDATE_SECONDS = 4.0
"""Between two updates of the progress, each 15 to 75 ms of waiting for the server."""
END_SECONDS = 20.0
CLIENT_RETRIES = 2
"""Of one request, 6 s in all; Prefect's default of five would take a minute."""


class Artifacts:
    """What one run shows, under `key` and what begins with it; for the flow's own thread."""

    def __init__(self, key: str, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._key = key
        self._logger = logger
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._troubled = False
        self._count = 0
        self._progress_id: Any = None
        self._updated_at = time.monotonic()
        self._updating = threading.Event()

    def begin(self, count: int) -> None:
        """The number of files to do."""
        self._count = count
        self._updated_at = time.monotonic()

    def update(self, done: int, text: str) -> None:
        """The number of files done; most calls cost nothing. Short runs have no progress artifact."""
        if not self._count or time.monotonic() < self._updated_at + UPDATE_SECONDS or self._updating.is_set():
            return
        self._updated_at = time.monotonic()
        percent, description = (
            min(100.0, 100.0 * done / self._count),
            f"{done} of {self._count} files: {text}",
        )
        self._updating.set()
        self._hand_over(lambda: self._show_progress(percent, description))

    def report(self, essence: str) -> None:
        """The report's essence, in Markdown, with a link to the page where it has one."""
        self._hand_over(lambda: _publish_report(f"{self._key}-report", essence))

    def table(self, rows: Sequence[dict[str, Any]], description: str) -> None:
        """The outcomes."""
        self._hand_over(lambda: _publish_table(self._key, rows, description))

    def end(self) -> None:
        """Wait, within bounds, for what is on its way; nothing more comes."""
        self._hand_over(lambda: self._show_progress(100.0, "") if self._progress_id is not None else None)
        self._jobs.put(None)
        assert self._thread is not None
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self._warn("the server takes too long")

    def _hand_over(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            # With the flow run's context: artifacts belong to a run, and its client is used.
            run = contextvars.copy_context().run
            self._thread = threading.Thread(
                target=run, args=[self._work], name="ptbin-artifacts", daemon=True
            )
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        with settings_with("client", max_retries=CLIENT_RETRIES):
            while (job := self._jobs.get()) is not None:
                try:
                    job()
                except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on without them
                    self._warn(f"{type(error).__name__}: {error}")
                finally:
                    self._updating.clear()

    def _warn(self, what: str) -> None:
        if not self._troubled:
            self._troubled = True
            self._logger.warning("artifacts are missing: %s", what)

    def _show_progress(self, percent: float, text: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._progress_id is None:
            key = f"{self._key}-progress"
            self._progress_id = create_progress_artifact(percent, key=key, description=text)
        else:
            update_progress_artifact(self._progress_id, percent, description=text or None)


def conversion_rows(entries: Iterable[Outcome]) -> list[dict[str, Any]]:
    """One row per checkpoint: new problems first, then the others, then by path."""
    ordered = sorted(entries, key=lambda entry: (entry.novelty != "new", not entry.reason, entry.path))
    return [
        {
            "checkpoint": entry.path,
            "outcome": entry.words,
            "since": entry.age,
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


def _publish_report(key: str, essence: str) -> None:
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(essence, key=key, description="What happened, and where the report is.")


def _publish_table(key: str, rows: Sequence[dict[str, Any]], description: str) -> None:
    # `key` is of lower-case letters, digits and dashes: Prefect refuses others.
    from prefect.artifacts import create_table_artifact

    if len(rows) > MAX_ROWS:
        description += f"\n\nThe first {MAX_ROWS} of {len(rows)} rows."
    create_table_artifact(key=key, table=list(rows[:MAX_ROWS]), description=description)
