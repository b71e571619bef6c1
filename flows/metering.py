"""Metrics of a run under way, where `PTBIN_METRICS` asks for them (`flows.metric_targets`).

What the run reports to its listener is counted on the way; a thread sends the counts every `SEND_SECONDS`
and once more at the end. A target that cannot be reached is logged once and costs nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from flows.environment import CLOSE_LIKENESS, METRICS, SETTINGS, unread_line
from flows.metric_targets import Target, parse_targets
from flows.prefect.undocumented import flow_run_context
from ptbin.errors import PtbinError
from ptbin.history.openmetrics import Family, families
from ptbin.runs.outcomes import Outcome
from ptbin.stores import public_uri
from tasks.live import Listener, LiveRun

SEND_SECONDS = 10.0
MEANINGS = {
    "run_active": "1 while a run is under way, 0 when it has ended.",
    "run_planned_checkpoints": "Files that the run is to work on.",
    "run_planned_bytes": "Their bytes.",
    "run_checkpoints": "Files that have their outcome, by outcome and reason.",
    "run_moved_bytes": "Bytes moved or read back so far, of files under way, too.",
    "run_read_bytes": "Bytes read for the files that have their outcome.",
    "run_written_bytes": "Bytes written for them.",
    "run_elapsed_seconds": "Seconds since the run began.",
    "run_updated_timestamp_seconds": "When these were sent.",
}


class Meter(Listener):
    """Counts what a run reports, and passes it on to the listener that was there."""

    def __init__(self, labels: dict[str, str], inner: Listener) -> None:
        self._labels = labels
        self._inner = inner
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._sums: Counter[str] = Counter()
        self._outcomes: Counter[tuple[str, str]] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def planned(self, files: int, nbytes: int, up_to_date: int) -> None:
        with self._lock:
            self._sums.update(run_planned_checkpoints=files, run_planned_bytes=nbytes)
            self._outcomes["up_to_date", ""] += up_to_date
        self._inner.planned(files, nbytes, up_to_date)

    def noted(self, text: str) -> None:
        self._inner.noted(text)

    def moved(self, nbytes: int) -> None:
        if nbytes:
            with self._lock:
                self._sums["run_moved_bytes"] += nbytes
        self._inner.moved(nbytes)

    def settled(self, entry: Outcome) -> None:
        with self._lock:
            self._outcomes[entry.kind, entry.reason] += 1
            self._sums.update(run_read_bytes=entry.read_nbytes, run_written_bytes=entry.written_nbytes)
        self._inner.settled(entry)

    def families(self, *, active: bool) -> list[Family]:
        """The counts so far."""
        found = families(MEANINGS)
        with self._lock:
            for name in MEANINGS:
                if name.endswith(("_bytes", "planned_checkpoints")):
                    found[name].add(self._labels, self._sums[name])
            for (outcome, reason), count in sorted(self._outcomes.items()):
                found["run_checkpoints"].add(self._labels, count, outcome=outcome, reason=reason)
        found["run_active"].add(self._labels, active)
        found["run_elapsed_seconds"].add(self._labels, time.monotonic() - self._began)
        found["run_updated_timestamp_seconds"].add(self._labels, time.time())
        return list(found.values())


@contextlib.contextmanager
def metering(live: LiveRun) -> Iterator[None]:
    """While the context lasts, send the run's metrics to what `PTBIN_METRICS` names.

    Raises:
        UsageError: the variable is not what `parse_targets` takes.
    """
    from prefect.logging import get_run_logger

    if line := unread_line(os.environ, SETTINGS, likeness=CLOSE_LIKENESS):
        get_run_logger().warning("%s", line)
    wanted = os.environ.get(METRICS, "")
    if not wanted.strip():
        yield
        return
    context = flow_run_context()
    parameters = (context.parameters if context is not None else None) or {}
    labels = {
        "dest": public_uri(str(parameters.get("dest", ""))),
        "kind": context.flow.name if context is not None and context.flow is not None else "",
        "source": public_uri(str(parameters.get("source", ""))),
    }
    targets = parse_targets(wanted, labels)
    live.listener = meter = Meter(labels, live.listener)
    ended = threading.Event()
    logger = get_run_logger()
    # One each: a target that does not answer keeps nothing from the others.
    senders = [
        threading.Thread(
            target=_send_until, args=(ended, target, meter, logger), name="ptbin-metrics", daemon=True
        )
        for target in targets
    ]
    for sender in senders:
        sender.start()
    try:
        yield
    finally:
        ended.set()
        deadline = time.monotonic() + SEND_SECONDS
        for sender in senders:
            sender.join(max(0.0, deadline - time.monotonic()))


def _send_until(
    ended: threading.Event,
    target: Target,
    meter: Meter,
    logger: logging.Logger | logging.LoggerAdapter[Any],
) -> None:
    troubled = False
    pause = 0.0  # the first ones go out at once
    active = True
    while active:
        active = not ended.wait(pause)
        pause = SEND_SECONDS
        found = meter.families(active=active)
        try:
            target.send(found)
        except (OSError, PtbinError) as error:
            if not troubled:
                logger.warning("metrics: %s", error)
            troubled = True
