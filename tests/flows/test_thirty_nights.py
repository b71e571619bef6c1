"""Thirty nights: files are added, changed, broken, mended, deleted and acknowledged, and the history says so.

Each night does what a flow does, by its plan, tally, ledger and record, on a calendar of its own, with no
server.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus

import ptbin
from flows.cli import app
from ptbin.catalog.finished import write_segment
from ptbin.catalog.plan import Plan
from ptbin.catalog.request import RunRequest
from ptbin.errors import CheckpointError, NotACheckpointError
from ptbin.history.failures import Ledger, acknowledge, write_unconverted
from ptbin.history.metrics import metrics_of_runs
from ptbin.history.openmetrics import render
from ptbin.history.records import iter_runs
from ptbin.history.status import Status, last_request, status_of
from ptbin.options import ConvertOptions
from ptbin.runs.outcomes import Converted, Outcome, outcome_of_error
from ptbin.runs.record import record_files, record_folder
from ptbin.runs.remembering import CheckpointMemory
from ptbin.runs.tally import Tally
from ptbin.stores import open_store, place_of
from ptbin.stores.local import LocalStore
from tests.fakes import CountingStore, registered
from tests.servers.prometheus import MONITORING, prometheus_program

FIRST = datetime(2026, 11, 1, 2, 0, tzinfo=UTC)
OPTIONS = ConvertOptions()


class Store:
    """A SOURCE that people work on by day, and what the nights make of it."""

    def __init__(self, folder: Path) -> None:
        self.source, self.dest = folder / "in", folder / "out"
        self.source.mkdir()
        torch.save({"state_dict": {"w": torch.arange(8.0)}}, folder / "x.pt")
        self.good = (folder / "x.pt").read_bytes()
        self.number = 0
        self.nights: list[dict[tuple[str, ...], float]] = []
        """The metrics after each."""

    @property
    def now(self) -> datetime:
        return FIRST + timedelta(days=self.number - 1)

    def put(self, name: str, *, broken: bool = False) -> None:
        path = self.source / name
        path.write_bytes(self.good[:-40] if broken else self.good)
        written = (self.now + timedelta(hours=10)).timestamp()  # by day, before the coming night
        os.utime(path, (written, written))

    def night(self) -> dict[str, Any]:
        """One run; its summary."""
        self.number += 1
        run_id = f"{self.now:%Y%m%dT%H%M%SZ}-{self.number:08x}"
        tally = Tally(run_id, str(self.source), str(self.dest), ledger=Ledger(now=self.now))
        request = RunRequest(str(self.source), str(self.dest), OPTIONS)
        with contextlib.closing(Plan(request)) as plan:
            plan.make()
            work = plan.work
            CheckpointMemory(plan).open(tally)
            tally.add_collisions(plan.problems)
            tally.add_all(work.iter_current(), "up_to_date")
            jobs = list(work.iter_to_do())
            rows = []
            for job in jobs:
                facts = tally.add(job, self.outcome(job, run_id)).converted
                if facts is not None and facts.index_row is not None:
                    rows.append(replace(facts.index_row, manifest=work.relative_manifest(job)))
            write_segment(place_of(self.dest), run_id, rows)
            left = CheckpointMemory(plan).close(tally, {job.path for job in jobs})
            write_unconverted(str(self.dest), left or [])
        summary = tally.summary(60.0)
        files = record_files(
            tally,
            summary,
            options=OPTIONS.to_json() | {"verify": "checksum"},
            flow_run_id=None,
            selection=request.selection(),
            ended=self.now + timedelta(minutes=1),
        )
        store, folder = open_store(record_folder(str(self.dest), run_id))
        for name, data in files.items():
            store.write_bytes(f"{folder}/{name}", data)
        self.nights.append(self.metrics())
        return summary | {"succeeded": tally.succeeded, "page": files["report.html"].decode()}

    def outcome(self, job: ptbin.catalog.Job, run_id: str) -> Outcome:
        try:
            published = ptbin.publish(ptbin.stage(job.source_uri, job.dest_uri, run_id=run_id))
        except NotACheckpointError as error:
            return outcome_of_error(job.path, error) if job.certain else Outcome(job.path, "not_a_checkpoint")
        except CheckpointError as error:
            return outcome_of_error(job.path, error)
        uri = job.dest_uri + ".manifest.json"
        facts = Converted.from_manifest(published.manifest, uri, published.identity)
        return Outcome(job.path, "converted", converted=facts)

    def acknowledge(self, name: str, days: int) -> None:
        until = (self.now + timedelta(days=days)).date()
        acknowledge(str(self.dest), [name], because="we know", until=f"{until}", today=self.now.date())

    def status(self) -> Status:
        """As of the coming afternoon."""
        places = str(self.source), str(self.dest)
        request, run = last_request(*places) or (RunRequest(*places), "")
        return status_of(request, run=run, now=self.now + timedelta(hours=12))

    def metrics(self) -> dict[tuple[str, ...], float]:
        """By name, outcome and reason."""
        text = render(metrics_of_runs("out", iter_runs(str(self.dest)), self.now + timedelta(minutes=2)))
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        same = [s for family in parse_prometheus(text) for s in family.samples]
        assert [(s.name, s.labels, s.value) for s in samples] == [(s.name, s.labels, s.value) for s in same]
        return {
            (s.name.removeprefix("ptbin_"), *filter(None, map(s.labels.get, ("outcome", "reason")))): s.value
            for s in samples
        }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def brief(summary: dict[str, Any]) -> dict[str, Any]:
    keys = ("converted", "up_to_date", "rejected", "known", "new", "resolved", "succeeded")
    return {key: summary[key] for key in keys if summary[key]}


@pytest.mark.thorough
def test_thirty_nights(store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store.put("a.pt")
    store.put("b.pt")
    assert store.status().counts["new"] == 2
    assert brief(store.night()) == {"converted": 2, "succeeded": True}  # 1
    assert brief(store.night()) == {"up_to_date": 2, "succeeded": True}  # 2
    assert store.status().is_in_step

    # A file comes in broken, and is new one night and old the next.
    store.put("cut.pt", broken=True)
    assert [row["path"] for row in store.status().listed["new"]] == ["cut.pt"]
    third = store.night()
    assert brief(third) == {"up_to_date": 2, "rejected": 1, "new": 1}
    assert "new: rejected" in third["page"]
    fourth = store.night()
    assert brief(fourth) == {"up_to_date": 2, "rejected": 1}
    assert fourth["problems"][0]["since"] == "2026-11-03T02:00:00Z"
    assert "rejected since 2026-11-03" in fourth["page"]
    status = store.status()
    assert (status.counts["failed"], status.counts["new"], status.is_in_step) == (1, 0, False)
    assert status.listed["failed"][0]["since"] == "2026-11-03T02:00:00Z"
    assert status.oldest == {"path": "cut.pt", "since": "2026-11-02T12:00:00Z"}
    assert store.metrics()["checkpoints", "rejected", "corrupt_archive"] == 1
    assert store.metrics()["new_failures",] == 0
    second = (FIRST + timedelta(days=1, minutes=1)).timestamp()
    assert store.metrics()["last_success_timestamp_seconds",] == second

    # Acknowledged for three days: green, then red again.
    store.acknowledge("cut.pt", 3)
    for _ in range(3):  # 5, 6, 7
        night = store.night()
        assert brief(night) == {"up_to_date": 2, "known": 1, "succeeded": True}
        assert night["known_problems"][0]["because"] == "we know (until 2026-11-07)"
        assert store.metrics()["checkpoints", "known", "corrupt_archive"] == 1
        assert store.metrics()["last_run_success",] == 1
    assert brief(store.night()) == {"up_to_date": 2, "rejected": 1}  # 8: expired, and nothing new
    store.acknowledge("cut.pt", 100)
    assert store.status().is_in_step
    assert brief(store.night())["known"] == 1  # 9

    # Changed and still broken: tried by itself, and new. Then mended.
    store.put("cut.pt", broken=True)
    assert [row["path"] for row in store.status().listed["new"]] == ["cut.pt"]
    assert brief(store.night()) == {"up_to_date": 2, "rejected": 1, "new": 1}  # 10
    assert store.status().listed["failed"][0]["since"] == "2026-11-10T02:00:00Z"
    store.put("cut.pt")
    eleventh = store.night()
    assert brief(eleventh) == {"converted": 1, "up_to_date": 2, "resolved": 1, "succeeded": True}
    assert eleventh["resolved_problems"][0]["reason"] == "corrupt_archive"
    assert store.metrics()["resolved_failures",] == 1

    # What was good goes bad, beside what is new; new ones are told first.
    store.put("a.pt", broken=True)
    assert [row["path"] for row in store.status().listed["changed"]] == ["a.pt"]
    assert brief(store.night())["new"] == 1  # 12
    store.put("z.pt", broken=True)
    thirteenth = store.night()
    assert [(Path(row["source"]).name, row["novelty"]) for row in thirteenth["problems"]] == [
        ("z.pt", "new"),
        ("a.pt", "old"),
    ]
    # One is deleted, the other's failure stays.
    (store.source / "z.pt").unlink()
    assert brief(store.night()) == {"up_to_date": 2, "rejected": 1, "resolved": 1}  # 14
    store.put("a.pt")
    assert brief(store.night())["resolved"] == 1  # 15

    # Two that would share an output; a source that goes leaves its output behind.
    store.put("b.ckpt")
    assert store.status().counts["refused"] == 2
    assert brief(store.night()) == {"up_to_date": 2, "rejected": 2, "new": 2}  # 16
    store.acknowledge("b.ckpt", 30)
    store.acknowledge("b.pt", 30)
    assert brief(store.night()) == {"up_to_date": 2, "known": 2, "succeeded": True}  # 17
    (store.source / "b.ckpt").unlink()
    (store.source / "cut.pt").unlink()
    assert [row["path"] for row in store.status().listed["orphaned"]] == ["cut.bin"]
    assert brief(store.night()) == {"up_to_date": 2, "resolved": 2, "succeeded": True}  # 18

    # Text that no name promises to be a checkpoint is looked at once and is due no more.
    store.put("notes.xyz", broken=True)
    (store.source / "notes.xyz").write_text("no checkpoint")
    assert store.status().counts["new"] == 1
    assert store.night()["succeeded"]  # 19
    assert (store.status().is_in_step, store.status().counts["not_checkpoints"]) == (True, 1)
    for _ in range(11):  # 20 to 30
        assert brief(store.night()) == {"up_to_date": 2, "succeeded": True}

    assert app.run(["runs", str(store.dest), "--last", "40", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["began"][:10] for run in runs] == [f"2026-11-{day:02}" for day in range(30, 0, -1)]
    red = [int(run["began"][8:10]) for run in reversed(runs) if not run["succeeded"]]
    assert red == [3, 4, 8, 10, 12, 13, 14, 16]
    assert [run["known"] for run in reversed(runs)][4:9] == [1, 1, 1, 0, 1]
    told = {"PtbinNewFailures": {3, 10, 12, 13, 16}, "PtbinRunFailed": set(red), "PtbinNoSuccess": {14}}
    hold_rules_against(store.nights, told, tmp_path)


def hold_rules_against(
    nights: list[dict[tuple[str, ...], float]], told: dict[str, set[int]], folder: Path
) -> None:
    """Which alert fires on which night, as promtool plays the rules on the metrics of each of them."""
    program = prometheus_program("promtool")
    if program is None:
        return  # `make prometheus-packages`
    names = ("new_failures", "last_run_success", "last_success_timestamp_seconds")
    began = FIRST.timestamp()  # promtool's clock begins with 0
    series = [
        {
            "series": f"ptbin_{name}",
            "values": " ".join(
                f"{night[name,] - (began if name.endswith('timestamp_seconds') else 0):g}" for night in nights
            ),
        }
        for name in names
    ]
    expected = [
        {
            "eval_time": f"{24 * number}h",
            "expr": f'ALERTS{{alertname="{name}"}}',
            "exp_samples": [
                {
                    "labels": f'ALERTS{{alertname="{name}", alertstate="firing", severity="{severity}"}}',
                    "value": 1,
                }
            ]
            if number + 1 in told[name]
            else [],
        }
        for name, severity in zip(told, ("warning", "warning", "critical"), strict=True)
        for number in range(len(nights))
    ]
    case = {"interval": "1d", "input_series": series, "promql_expr_test": expected}
    rules = {"rule_files": [str(MONITORING / "alerts.yml")], "evaluation_interval": "1d", "tests": [case]}
    (folder / "nights.yml").write_text(json.dumps(rules))
    done = subprocess.run(
        [program, "test", "rules", "nights.yml"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_status_costs_a_listing_and_the_index_and_lists_no_more_than_it_shows(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        store.put(f"{number}.pt")
    store.put("cut.pt", broken=True)
    store.night()
    for number in range(5):
        store.put(f"later{number}.pt")
    monkeypatch.setattr("ptbin.history.status.MAX_LISTED", 2)
    with registered("counting", CountingStore(LocalStore())) as counting:
        status = status_of(RunRequest(str(store.source), f"counting://{store.dest}"), now=store.now)
    assert (status.counts["up_to_date"], status.counts["new"], status.counts["failed"]) == (6, 5, 1)
    assert len(status.listed["new"]) == 2
    assert counting.count("list") == 1
    assert counting.count("open") == 2  # the index, and what failed: not one manifest
    assert counting.count("stat") == 0


def test_the_command_asks_what_the_last_run_was_asked(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> tuple[int, Any]:
        status = app.run(["status", str(store.source), str(store.dest), "--json", *words])
        return status, json.loads(capsys.readouterr().out)

    store.put("a.pt")
    assert told()[0] == 1
    summary = store.night()
    status, found = told()
    assert (status, found["as_run"], found["in_step"]) == (0, summary["run_id"], True)
    status, found = told("--dtype", "float16")
    assert (status, found["as_run"], found["counts"]["changed"]) == (1, "", 1)
    assert found["changed"][0]["path"] == "a.pt"
    assert app.run(["status", str(store.source / "nowhere"), str(store.dest)]) == 2
