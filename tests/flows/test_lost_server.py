"""Prefect's server is killed while a run is under way: the work is done, accounted for, and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.artifacts import Artifacts
from flows.prefect import orchestrator
from tests.flows.test_cli_process import wait_for
from tests.servers.prefect_stack import descendants

Start = Callable[..., "subprocess.Popen[str]"]

COUNT = 40
# Long enough that a progress artifact falls due while the server is gone (`flows.artifacts.UPDATE_SECONDS`).
SLOW = """
import time
from pathlib import Path
import ptbin
import ptbin.runs.steps
really = ptbin.runs.steps.stage
def stage(source, dest, *arguments, progress, **options):
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        time.sleep(0.02)
        progress(0)
    return really(source, dest, *arguments, progress=progress, **options)
ptbin.runs.steps.stage = stage
from flows.cli import main
main()
"""


@pytest.fixture
def run_without_server(ptbin_started: Start, tmp_path: Path) -> subprocess.Popen[str]:
    """A run that has written some outputs, and whose server is no more."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(COUNT):
        torch.save({"w": torch.full((8,), float(number))}, source / f"{number:02}.pt")
    process = ptbin_started("convert", source, "out", "--json", code=SLOW, python=sys.executable)
    wait_for(lambda: len(list((tmp_path / "out").glob("*.manifest.json"))) > 2)
    for child in descendants(process.pid):
        os.kill(child, signal.SIGKILL)
    return process


def record_of(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "out" / "_ptbin" / "runs").glob("*/run.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_work_is_done_and_recorded(run_without_server: subprocess.Popen[str], tmp_path: Path) -> None:
    out, err = run_without_server.communicate(timeout=600)
    assert run_without_server.returncode == 0, err
    assert json.loads(out)["converted"] == COUNT
    assert "Prefect's server" in err
    assert "Traceback" not in err
    assert "EventsWorker" not in err
    record = record_of(tmp_path)
    assert (len(record["checkpoints"]), record["interrupted"]) == (COUNT, False)
    assert not list((tmp_path / "out" / "_ptbin" / "leases").iterdir())


def test_an_interrupt_is_heard_within_seconds(
    run_without_server: subprocess.Popen[str], tmp_path: Path
) -> None:
    time.sleep(1)
    run_without_server.send_signal(signal.SIGINT)
    # 20 s are one event that is just being sent; a client that tries everything again takes many minutes.
    out, err = run_without_server.communicate(timeout=200)
    assert run_without_server.returncode == 130, err
    record = record_of(tmp_path)
    assert record["interrupted"]
    counts = [record[name] for name in ("converted", "failed", "not_tried")]
    assert sum(counts) == COUNT
    assert json.loads(out)["converted"] == record["converted"] > 0


def test_a_server_that_comes_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(orchestrator, "server_answers", lambda: next(answers))
    monkeypatch.setattr(orchestrator, "is_embedded", lambda: False)
    checked: list[None] = []
    assert orchestrator.await_server(lambda: checked.append(None), seconds=20)
    assert len(checked) == 2


def test_artifacts_that_cannot_be_sent_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    artifacts = Artifacts("ptbin-test", logging.getLogger("test"))

    def fail(*_: Any) -> None:
        raise ConnectionError("nobody there")

    for name in ("_publish_report", "_publish_table"):
        pytest.MonkeyPatch().setattr(f"flows.artifacts.{name}", fail)
    artifacts.report("essence")
    artifacts.table([], "")
    artifacts.end()
    assert [record.getMessage() for record in caplog.records] == [
        "artifacts are missing: ConnectionError: nobody there"
    ]
