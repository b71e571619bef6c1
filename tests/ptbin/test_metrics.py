"""Metrics from run records, as the reference parsers read them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from flows.cli import app
from ptbin.history.metrics import metrics_of_runs
from ptbin.history.openmetrics import render
from ptbin.history.records import RecordedRun

NOW = datetime(2026, 11, 10, 3, 0, tzinfo=UTC)


def recorded(**facts: Any) -> RecordedRun:
    whole = {"run_id": "r", "kind": "convert", "source": "/in", "ended": "2026-11-10T02:00:00Z", **facts}
    return RecordedRun("r", whole)


def samples(*runs: RecordedRun, dest: str = "/out") -> list[tuple[str, dict[str, str], float]]:
    text = render(metrics_of_runs(dest, runs, NOW))
    return [
        (s.name, s.labels, s.value) for family in text_string_to_metric_families(text) for s in family.samples
    ]


def value(found: list[tuple[str, dict[str, str], float]], name: str, **labels: str) -> list[float]:
    return [v for n, have, v in found if n == f"ptbin_{name}" and labels.items() <= have.items()]


def test_each_source_has_its_newest_run_and_the_last_that_succeeded() -> None:
    found = samples(
        recorded(rejected=3, failed=1, by_reason={"rejected": {"corrupt_archive": 2, "unsafe_pickle": 1}},
                 oldest_unconverted={"path": "x", "since": "2026-11-10T01:00:00Z"}),
        recorded(source="/other", converted=5, ended="2026-11-09T02:00:00Z"),
        recorded(converted=7, ended="2026-11-08T02:00:00Z"),
    )  # fmt: skip
    rejected = {"source": "/in", "outcome": "rejected"}
    assert value(found, "checkpoints", **rejected, reason="corrupt_archive") == [2]
    assert value(found, "checkpoints", **rejected, reason="unsafe_pickle") == [1]
    assert value(found, "checkpoints", **rejected, reason="") == []
    assert value(found, "checkpoints", source="/in", outcome="failed") == [1]
    assert value(found, "checkpoints", outcome="converted") == [0, 5]
    assert value(found, "last_run_success") == [0, 1]
    eighth = datetime(2026, 11, 8, 2, tzinfo=UTC).timestamp()
    assert value(found, "last_success_timestamp_seconds", source="/in") == [eighth]
    assert value(found, "oldest_unconverted_age_seconds") == [7200]


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "line\nbreak", "ünï", "}# EOF"])
def test_names_end_no_label_and_no_line(name: str) -> None:
    found = samples(recorded(source=name), dest=name)
    assert {(labels["source"], labels["dest"]) for _, labels, _ in found} == {(name, name)}


def test_unreadable_records_and_none_at_all_make_no_metrics() -> None:
    assert samples() == []
    assert samples(RecordedRun("r", {}, "it is not a run record")) == []


def test_the_file_is_whole_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out/_ptbin/runs/20261110T020000Z-aaaa"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(recorded(converted=2).facts))
    target = tmp_path / "ptbin.prom"
    assert app.run(["metrics", str(tmp_path / "out"), "--textfile", str(target)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "ptbin.prom"}
    assert target.read_text().endswith("# EOF\n")
    assert capsys.readouterr().out == ""
    assert app.run(["metrics", str(tmp_path / "out")]) == 0
    assert 'outcome="converted"' in capsys.readouterr().out
    assert app.run(["metrics", str(tmp_path / "out"), "--textfile", str(tmp_path / "no/x.prom")]) == 2
    assert app.run(["metrics", str(tmp_path / "nowhere")]) == 2
