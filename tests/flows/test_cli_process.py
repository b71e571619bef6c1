"""The command line as whole processes: what it imports, signals, history on its own server, children left."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.prefect.orchestrator import Orchestrator
from tests.servers.prefect_stack import descendants

Run = Callable[..., subprocess.CompletedProcess[str]]
Database = Callable[[str], list[tuple[Any, ...]]]
Start = Callable[..., "subprocess.Popen[str]"]

HEAVY = ("prefect", "torch", "rich", "fsspec", "boto3", "numpy", "pydantic")
REPORT_IMPORTS = f"""
import sys
from flows.cli.app import run
status = run()
heavy = [name for name in {HEAVY!r} if name in sys.modules]
print("imported", heavy, file=sys.stderr)
sys.exit(status)
"""

# Conversions that take for ever, so that a signal surely finds one under way.
SLOW = """
import time
from pathlib import Path
import ptbin
import ptbin.runs.steps
def stage(source, dest, options, *, progress, **_):
    Path("staging").touch()
    while True:
        time.sleep(0.02)
        progress(1)
ptbin.runs.steps.stage = stage
def convert(source, dest, options, *, progress, **_):
    stage(source, dest, options, progress=progress)
ptbin.convert = convert
from flows.cli import main
main()
"""


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("command", ["inspect", "convert", "verify", "--help", "--version"])
def test_small_commands_import_nothing_heavy(
    ptbin: Run, checkpoint: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "x.bin"
    words = {"inspect": [checkpoint], "convert": [checkpoint, out], "verify": [out]}.get(command, [])
    if command == "verify":
        assert ptbin("convert", checkpoint, out).returncode == 0
    done = ptbin(command, *words, code=REPORT_IMPORTS, python=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "imported []"


def test_a_whole_run_leaves_a_complete_history_and_no_chatter(
    ptbin: Run, source: Path, tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh"  # its server makes its own database
    done = ptbin("convert", source, "out", "--json", home=fresh)
    assert done.returncode == 1
    summary = json.loads(done.stdout)
    assert (summary["converted"], summary["rejected"], summary["failed"]) == (12, 4, 0)
    assert all(line.startswith("ptbin: ") for line in done.stderr.splitlines()), done.stderr
    connection = sqlite3.connect(fresh / "prefect.db")
    ((flow_run, state),) = connection.execute("select id, state_type from flow_run").fetchall()
    assert state == "FAILED"
    kinds: dict[str, int] = dict(
        connection.execute("select state_type, count(*) from task_run group by 1").fetchall()
    )
    # What the batches came to is in the task runs' names: all of them are there, and all are final.
    names = [name for (name,) in connection.execute("select name from task_run")]
    connection.close()
    assert flow_run
    assert set(kinds) == {"COMPLETED"}
    several = [re.match(r"convert (\d+) checkpoints", name) for name in names if name.startswith("convert ")]
    assert (
        sum(int(match[1]) if match else 1 for match in several) == 15
    )  # 12 good, hostile, truncated, notes; the twins were never begun
    assert sum(name.startswith("write run record") for name in names) == 1


def test_bulk_conversion_and_verification_by_status(ptbin: Run, good_source: Path, tmp_path: Path) -> None:
    first = ptbin("convert", good_source, "out")
    assert first.returncode == 0, first.stderr
    assert "converted   6" in first.stdout
    (tmp_path / "out" / "0.bin.manifest.json").unlink()
    second = ptbin("verify", "out", PREFECT_LOGGING_LEVEL="INFO")
    assert second.returncode == 1
    assert "no_manifest" in second.stdout


def test_a_running_server_is_used_where_one_is_named(
    ptbin: Run, good_source: Path, tmp_path: Path, server: Orchestrator, database: Database
) -> None:
    unused = tmp_path / "unused"
    done = ptbin("convert", good_source, "out", "--json", "-q", home=unused, PREFECT_API_URL=server.api_url)
    assert done.returncode == 0, done.stderr
    record = next((tmp_path / "out" / "_ptbin" / "runs").glob("*/run.json"))
    flow_run = json.loads(record.read_text())["prefect_flow_run_id"]
    assert database(f"select state_type from flow_run where id = '{flow_run}'") == [("COMPLETED",)]
    assert not (unused / "prefect.db").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_of_one_file_leaves_nothing(
    ptbin_started: Start, checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = ptbin_started("convert", checkpoint, "out/x.bin", code=SLOW)
    wait_for((tmp_path / "staging").exists)
    process.send_signal(number)
    _, problems = process.communicate(timeout=600)
    assert process.returncode == 130
    assert problems == "ptbin: interrupted\n"
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_recorded_as_crashed_and_leaves_no_server(
    ptbin_started: Start, good_source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    # Ctrl-C on a command as a user starts it.
    python = sys.executable if number == signal.SIGINT else None
    process = ptbin_started("convert", good_source, "out", code=SLOW, python=python)
    wait_for((tmp_path / "staging").exists)
    children = descendants(process.pid)
    assert children
    process.send_signal(number)
    _, problems = process.communicate(timeout=600)
    assert process.returncode == 130
    assert problems.splitlines()[-1] == "ptbin: interrupted"
    assert "Traceback" not in problems
    assert not any(map(is_alive, children))
    connection = sqlite3.connect(tmp_path / "home" / "prefect.db")
    assert connection.execute("select state_type from flow_run").fetchall() == [("CRASHED",)]
    connection.close()


def test_a_killed_run_leaves_no_server_behind(
    ptbin_started: Start, good_source: Path, tmp_path: Path
) -> None:
    process = ptbin_started("convert", good_source, "out", code=SLOW, python=sys.executable)
    wait_for((tmp_path / "staging").exists)
    children = descendants(process.pid)
    assert children
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=600)
    wait_for(lambda: not any(map(is_alive, children)))


def test_a_server_that_cannot_start_is_one_line(ptbin: Run, good_source: Path, tmp_path: Path) -> None:
    done = ptbin(
        "convert", good_source, "out", PREFECT_SERVER_DATABASE_CONNECTION_URL="sqlite+aiosqlite:////no/x.db"
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("ptbin: error: Prefect's embedded server ended")
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("words", [["--log-format", "json"], ["--log-format=json"]])
def test_json_lines_are_all_there_is_on_standard_error(
    ptbin_started: Start, checkpoint: Path, tmp_path: Path, words: list[str]
) -> None:
    process = ptbin_started("convert", checkpoint, "out/x.bin", *words, code=SLOW)
    wait_for((tmp_path / "staging").exists)
    process.send_signal(signal.SIGINT)
    _, problems = process.communicate(timeout=600)
    told = [json.loads(line) for line in problems.splitlines()]
    assert (told[-1]["event"], told[-1]["level"], told[-1]["message"]) == (
        "message",
        "warning",
        "interrupted",
    )
    wrong = ptbin_started("convert", tmp_path / "nothing here", "out", *words)
    _, problems = wrong.communicate(timeout=600)
    assert wrong.returncode == 2
    (line,) = problems.splitlines()
    assert json.loads(line)["level"] == "error"
    assert "nothing here" in json.loads(line)["message"]
