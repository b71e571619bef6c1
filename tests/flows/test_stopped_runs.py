"""Runs that end before their time, by a deadline, a lost lease, a fault, the first problem: all account."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import conversion
from flows.convert import convert
from flows.prefect.orchestrator import Orchestrator
from flows.sync import sync
from ptbin.conversion import stage as really_stage
from ptbin.errors import UsageError
from ptbin.runs.run_ids import new_run_id
from ptbin.stores.local import LocalStore
from tasks.live import Listener, LiveRun, find_live_run, open_live_run
from tests.fakes import FaultyStore, SlowStore, registered

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.usefixtures("server")


def run(
    flow: Any, source: str | Path, dest: Path, given: LiveRun | None = None, **parameters: Any
) -> tuple[Any, dict[str, Any]]:
    with open_live_run(given or LiveRun(new_run_id())) as live:
        state = flow(source=str(source), dest=str(dest), run_id=live.run_id, return_state=True, **parameters)
    return state, live.summary


def record_of(dest: Path) -> dict[str, Any]:
    (path,) = (dest / "_ptbin" / "runs").glob("*/run.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("command", ["convert", "sync"])
def test_a_deadline_that_passed_while_listing_is_told_in_a_document(
    ptbin: Run, good_source: Path, server: Orchestrator, command: str
) -> None:
    words = [command, good_source, "out", "--deadline", "0.001", "--json", "--quiet"]
    done = ptbin(*words, PREFECT_API_URL=server.api_url)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads(done.stdout)
    assert {problem["reason"] for problem in summary["problems"]} == {"run_stopped"}
    assert summary["converted"] == 0


def test_a_deadline_ends_the_run_and_says_what_it_did_not_come_to(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[Passes] = []

    class Passes:
        """A timer that is up when the test says so."""

        def __init__(self, seconds: float, do: Callable[..., None], words: list[str]) -> None:
            self.up = lambda: do(*words)
            timers.append(self)

        def start(self) -> None: ...

        cancel = start

    begun = 0

    def stage(*arguments: Any, **options: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun == 4:
            timers[0].up()
        return really_stage(*arguments, **options)

    monkeypatch.setattr("ptbin.runs.steps.stage", stage)
    monkeypatch.setattr("flows.access.threading", SimpleNamespace(Timer=Passes))
    state, summary = run(convert, good_source, tmp_path / "out", deadline="10s", workers=1)
    assert state.is_failed()
    assert [problem["reason"] for problem in summary["problems"]] == ["run_stopped"]
    assert "deadline of 10 s" in summary["problems"][0]["detail"]
    told = record_of(tmp_path / "out")
    assert told["converted"] == summary["converted"]
    assert 0 < told["converted"] < 4
    assert told["not_tried"] == 6 - told["converted"]
    assert not told["interrupted"]


@pytest.mark.parametrize("flow", [convert, sync])
def test_a_lease_lost_while_listing_fails_the_run(good_source: Path, tmp_path: Path, flow: Any) -> None:
    live = LiveRun(new_run_id())
    store = FaultyStore(LocalStore(), {"list": [lambda: live.stop("the lease is lost")]})
    with registered("losing", store):
        state, summary = run(flow, f"losing://{good_source}", tmp_path / "out", live)
    assert store.struck["list"] == 1
    assert state.is_failed()
    assert "the lease is lost; nothing was begun" in state.message
    assert "message" not in summary
    assert not list((tmp_path / "out" / "_ptbin" / "leases").iterdir())


def test_a_fault_of_ours_is_accounted_for_as_well(good_source: Path, tmp_path: Path) -> None:
    class Broken(Listener):
        def planned(self, files: int, nbytes: int, up_to_date: int) -> None:
            raise RuntimeError("no such thing")

    state, summary = run(convert, good_source, tmp_path / "out", LiveRun(new_run_id(), listener=Broken()))
    assert state.is_failed()
    assert summary["problems"][0]["reason"] == "internal_error"
    assert record_of(tmp_path / "out")["not_tried"] == 6


def test_what_the_first_problem_left_unasked_is_not_tried(source: Path, tmp_path: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file() and not path.name.startswith("twin") and path.name != "05.pt":
            path.unlink()
    # There, and unknown to any index: whether it is up to date would have to be asked.
    assert run(convert, source / "run", tmp_path / "out" / "run")[0].is_completed()
    state, _ = run(convert, source, tmp_path / "out", fail_fast=True)
    assert (state.message or "").splitlines()[
        0
    ] == "converted 0, up to date 0, rejected 2, failed 0, not tried 1"


def test_what_is_up_to_date_is_counted_in_an_interrupted_run(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(convert, good_source, tmp_path / "out")[0].is_completed()

    def interrupt(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion.Conversion, "drop_up_to_date", interrupt)
    with pytest.raises(KeyboardInterrupt), open_live_run(LiveRun(new_run_id())) as live:
        convert(source=str(good_source), dest=str(tmp_path / "out"), run_id=live.run_id)
    assert live.summary["interrupted"]
    assert live.summary["up_to_date"] == 6


def test_the_seconds_of_a_run_are_all_that_passed(good_source: Path, tmp_path: Path) -> None:
    live = LiveRun(new_run_id())
    live.began -= 1000  # when the command was given, long before
    with registered("slowly", SlowStore(LocalStore(), 1.5, ["list"])):
        _, summary = run(convert, f"slowly://{good_source}", tmp_path / "out", live)
    assert summary["seconds"] > 1001.5


@pytest.mark.parametrize("run_id", ["../../../esc", "a/b", "..", "a\nb", "x" * 101])
def test_a_run_id_that_is_no_plain_name_is_refused(good_source: Path, tmp_path: Path, run_id: str) -> None:
    dest = tmp_path / "deep" / "in" / "out"
    state = convert(source=str(good_source), dest=str(dest), run_id=run_id, return_state=True)
    assert state.is_failed()
    with pytest.raises(UsageError, match="is not a run id"):
        state.result()
    assert not (tmp_path / "deep").exists()
    with pytest.raises(LookupError):
        find_live_run(run_id)


def test_what_a_run_did_not_come_to_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror ends at its first problem, and then meets a fault in what follows."""
    for number in range(4):
        (tmp_path / "in" / f"{number}.pt").parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.pt").write_bytes(b"PK\3\4" + bytes(100 + number))

    def fails(*_: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("ptbin.catalog.plan.Plan.iter_gone", fails)
    places = tmp_path / "in", tmp_path / "out"
    state, summary = run(sync, *places, fail_fast=True, delete=True, workers=1)
    assert state.is_failed()
    assert "a fault of ours" in summary["message"]
    counts = {name: summary[name] for name in ("converted", "up_to_date", "rejected", "failed", "not_tried")}
    assert sum(counts.values()) == 4, counts
    assert counts["not_tried"] > 0
