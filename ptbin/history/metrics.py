"""OpenMetrics text from the run records of a destination. Pure: runs in, text out.

Only gauges, each of the newest run for a SOURCE, so that the text is also valid in Prometheus's own format,
which is what node_exporter's textfile collector reads. Names end in their unit.

Source: the OpenMetrics specification 1.0 (names, escapes, `# EOF`), Prometheus's text format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from ptbin.history.records import RecordedRun

__all__ = ["render_metrics"]

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


@dataclass(slots=True)
class _Family:
    """One metric: its name without `ptbin_`, what it means, its samples."""

    name: str
    help: str
    samples: list[tuple[dict[str, str], float]] = field(default_factory=list)

    def add(self, labels: Mapping[str, str], value: float, **more: str) -> None:
        self.samples.append(({**labels, **more}, value))

    def lines(self) -> list[str]:
        if not self.samples:
            return []
        name = f"ptbin_{self.name}"
        lines = [f"# HELP {name} {_escaped(self.help)}", f"# TYPE {name} gauge"]
        for labels, value in self.samples:
            inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            lines.append(f"{name}{{{inside}}} {value:.17g}")
        return lines


def render_metrics(dest: str, runs: Iterable[RecordedRun], now: datetime) -> str:
    """The text for the runs of one destination, given newest first. Unreadable records are passed over."""
    newest: dict[tuple[str, str], RecordedRun] = {}
    success: dict[tuple[str, str], float] = {}
    for run in runs:
        key = (run.text("kind"), run.text("source"))
        if run.problem or not key[0]:
            continue
        newest.setdefault(key, run)
        if run.succeeded and key not in success:
            success[key] = _ended(run)
    families = _families()
    for key, run in newest.items():
        labels = {"dest": dest, "kind": key[0], "source": key[1]}
        _add_run(families, labels, run, now)
        if key in success:
            families["last_success_timestamp_seconds"].add(labels, success[key])
    lines = [line for family in families.values() for line in family.lines()]
    return "\n".join([*lines, "# EOF"]) + "\n"


def _families() -> dict[str, _Family]:
    meanings = {
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
    return {name: _Family(name, text) for name, text in meanings.items()}


def _add_run(
    families: Mapping[str, _Family], labels: Mapping[str, str], run: RecordedRun, now: datetime
) -> None:
    by_reason = run.mapping("by_reason")
    for name, outcome in OUTCOMES.items():
        count = run.number(name)
        reasons: Mapping[str, int] = by_reason.get(outcome, {})
        for reason, part in sorted(reasons.items()):
            families["checkpoints"].add(labels, part, outcome=outcome, reason=reason)
            count -= part
        if count or not reasons:
            families["checkpoints"].add(labels, count, outcome=outcome, reason="")
    families["new_failures"].add(labels, run.number("new"))
    families["resolved_failures"].add(labels, run.number("resolved"))
    for name in ("source_bytes", "read_bytes", "written_bytes"):
        families[name].add(labels, run.number(name))
    families["copied_in_store_bytes"].add(labels, run.number("copied_bytes"))
    families["run_duration_seconds"].add(labels, run.number("seconds"))
    families["last_run_success"].add(labels, run.succeeded)
    if ended := _ended(run):
        families["last_run_timestamp_seconds"].add(labels, ended)
    if since := _seconds(run.mapping("oldest_unconverted").get("since")):
        age = max(0.0, now.timestamp() - since)
        families["oldest_unconverted_age_seconds"].add(labels, age)


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


def _escaped(text: str) -> str:
    """As both formats want label values; line breaks and quotes would end them."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
