"""Metrics out of the run records of a destination, each of the newest run for a SOURCE. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from ptbin.history.openmetrics import Family, families
from ptbin.history.records import RecordedRun

OUTCOMES = {
    "converted": "converted",
    "copied": "copied",
    "up_to_date": "up_to_date",
    "rejected": "rejected",
    "failed": "failed",
    "known": "known",
    "left_alone": "left_alone",
    "not_checkpoints": "not_a_checkpoint",
    "not_tried": "not_tried",
}
"""Fields of a run record, and what the label calls them."""
MEANINGS = {
    "checkpoints": "Checkpoints of the last run, by outcome and reason.",
    "new_failures": "Failures of the last run that no earlier run had seen in that state.",
    "resolved_failures": "Failures of earlier runs that the last run no longer found.",
    "source_bytes": "Size of what the last run converted.",
    "read_bytes": "Bytes that the last run read, proof included.",
    "written_bytes": "Bytes that the last run wrote.",
    "copied_in_store_bytes": "Of what the last run wrote, bytes that the store copied by itself.",
    "run_duration_seconds": "How long the last run took.",
    "last_run_timestamp_seconds": "When the last run ended.",
    "last_run_success": "1 if the last run succeeded, else 0.",
    "last_success_timestamp_seconds": "When the last run that succeeded ended.",
    "oldest_unconverted_age_seconds": "Age of the oldest checkpoint that the last run failed at.",
}


def metrics_of_runs(dest: str, runs: Iterable[RecordedRun], now: datetime) -> list[Family]:
    """Of the runs of one destination, given newest first. Unreadable records are passed over."""
    newest: dict[tuple[str, str], RecordedRun] = {}
    success: dict[tuple[str, str], float] = {}
    for run in runs:
        key = (run.text("kind"), run.text("source"))
        if run.problem or not key[0]:
            continue
        newest.setdefault(key, run)
        if run.succeeded and key not in success:
            success[key] = _ended(run)
    found = families(MEANINGS)
    for key, run in newest.items():
        labels = {"dest": dest, "kind": key[0], "source": key[1]}
        _add_run(found, labels, run, now)
        if key in success:
            found["last_success_timestamp_seconds"].add(labels, success[key])
    return list(found.values())


def _add_run(found: Mapping[str, Family], labels: Mapping[str, str], run: RecordedRun, now: datetime) -> None:
    by_reason = run.mapping("by_reason")
    for name, outcome in OUTCOMES.items():
        count = run.number(name)
        reasons: Mapping[str, int] = by_reason.get(outcome, {})
        for reason, part in sorted(reasons.items()):
            found["checkpoints"].add(labels, part, outcome=outcome, reason=reason)
            count -= part
        if count or not reasons:
            found["checkpoints"].add(labels, count, outcome=outcome, reason="")
    found["new_failures"].add(labels, run.number("new"))
    found["resolved_failures"].add(labels, run.number("resolved"))
    for name in ("source_bytes", "read_bytes", "written_bytes"):
        found[name].add(labels, run.number(name))
    found["copied_in_store_bytes"].add(labels, run.number("copied_bytes"))
    found["run_duration_seconds"].add(labels, run.number("seconds"))
    found["last_run_success"].add(labels, run.succeeded)
    if ended := _ended(run):
        found["last_run_timestamp_seconds"].add(labels, ended)
    if since := _seconds(run.mapping("oldest_unconverted").get("since")):
        age = max(0.0, now.timestamp() - since)
        found["oldest_unconverted_age_seconds"].add(labels, age)


def _ended(run: RecordedRun) -> float:
    """Seconds since 1970; of early versions' records by their begin and duration; 0 where unknown."""
    return _seconds(run.text("ended")) or (_seconds(run.began) + run.number("seconds") if run.began else 0.0)


def _seconds(moment: object) -> float:
    if not isinstance(moment, str):
        return 0.0
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return 0.0
