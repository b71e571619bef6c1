"""A migration every night: failures are new once, then old, known when acknowledged, and resolved."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run as run_command
from flows.migrate import migrate
from ptbin.history.failures import acknowledge
from ptbin.history.records import iter_runs
from ptbin.runs.run_ids import new_run_id
from tasks.live import LiveRun, open_live_run

pytestmark = pytest.mark.usefixtures("server")

HOSTILE = b"cposix\nsystem\n(S'touch /tmp/never'\ntR."


@pytest.fixture
def registry(tmp_path: Path, checkpoint: Path) -> Path:
    """Two models; a version of each is good, one is hostile, one is cut short."""
    registry = tmp_path / "registry"
    for version in ("resnet/1", "resnet/2", "bert/1", "bert/2"):
        (registry / version).mkdir(parents=True)
        shutil.copyfile(checkpoint, registry / version / "model.pt")
    (registry / "resnet/2/model.pt").write_bytes(HOSTILE)
    (registry / "bert/2/model.pt").write_bytes(checkpoint.read_bytes()[:-40])
    return registry


def night(source: Path, dest: Path, **asked: Any) -> tuple[str, dict[str, Any]]:
    """The message of the run's state behind the counts, and the summary."""
    with open_live_run(LiveRun(new_run_id())) as live:
        state = migrate(str(source), str(dest), run_id=live.run_id, return_state=True, **asked)
    assert state.is_completed() == live.summary["succeeded"]
    return state.message or "", live.summary


def counts(summary: dict[str, Any]) -> dict[str, int]:
    names = ("migrated", "rejected", "known", "new", "resolved")
    return {name: summary[name] for name in names if summary[name]}


def test_a_version_that_fails_is_news_once(registry: Path, tmp_path: Path, checkpoint: Path) -> None:
    dest = tmp_path / "dest"
    message, first = night(registry, dest)
    assert counts(first) == {"migrated": 2, "rejected": 2, "new": 2}
    assert "new: bert/2: corrupt_archive: " in message

    message, second = night(registry, dest)
    assert counts(second) == {"rejected": 2}
    assert f"since {datetime.now(UTC):%Y-%m-%d}: bert/2: corrupt_archive: " in message

    today = datetime.now(UTC).date()
    acknowledge(str(dest), ["resnet/2"], because="as it is", until=f"{today + timedelta(7)}", today=today)
    _, third = night(registry, dest)
    assert counts(third) == {"rejected": 1, "known": 1}
    assert [row["outcome"] for row in third["versions"] if row["version"] == "2"] == ["rejected", "known"]

    shutil.copyfile(checkpoint, registry / "bert/2/model.pt")
    _, fourth = night(registry, dest)
    assert counts(fourth) == {"migrated": 1, "known": 1, "resolved": 1}
    assert fourth["succeeded"]

    (registry / "resnet/2/model.pt").write_bytes(HOSTILE + b"more")
    _, fifth = night(registry, dest)
    assert counts(fifth) == {"rejected": 1, "new": 1}, "what is acknowledged is one state of the version"

    runs = list(iter_runs(str(dest)))
    assert [run.text("kind") for run in runs] == ["migrate"] * 5
    assert [int(run.number("new")) for run in reversed(runs)] == [2, 0, 0, 0, 1]


def test_what_a_migration_did_not_look_at_stays_as_it_was(registry: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    night(registry, dest)
    _, partly = night(registry, dest, include=["resnet"])
    assert counts(partly) == {"rejected": 1}
    shutil.rmtree(registry / "bert")
    _, elsewhere = night(registry, dest, include=["resnet"])
    assert counts(elsewhere) == {"rejected": 1}
    _, all_of_it = night(registry, dest)
    assert counts(all_of_it) == {"rejected": 1, "resolved": 1}


def test_the_commands_of_the_second_day_know_migrations(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "dest"
    night(registry, dest)
    assert run_command(["acknowledge", str(dest), "bert/2", "--reason", "cut", "--until", "2099-01-01"]) == 0
    assert "known until 2099-01-01: bert/2: corrupt_archive" in capsys.readouterr().out
    assert run_command(["status", str(registry), str(dest), "--json"]) == 1
    status = json.loads(capsys.readouterr().out)
    assert status["kind"] == "migrate"
    assert status["counts"]["up_to_date"] == 2
    assert [row["path"] for row in status["failed"]] == ["resnet/2"]
    assert status["failed"][0]["since"]
    assert [row["path"] for row in status["known"]] == ["bert/2"]
    words = ["migrate", str(registry), str(dest), "--dry-run"]
    assert run_command([*words, "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    known, left = ([row["source"] for row in plan[name]] for name in ("known_problems", "problems"))
    assert (known, left) == (["bert/2"], ["resnet/2"])
    assert run_command([*words, "--exclude", "resnet"]) == 0, "as the run will"
    assert "refused 0, known failures 1" in capsys.readouterr().out
    (registry / "gpt/1").mkdir(parents=True)
    shutil.copyfile(registry / "bert/1/model.pt", registry / "gpt/1/model.pt")
    os.utime(registry / "resnet/1/model.pt", (1, 1))
    assert run_command(["status", str(registry), str(dest), "--json"]) == 1
    status = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in status["new"]] == ["gpt/1"]
    assert [row["path"] for row in status["changed"]] == ["resnet/1"]
    assert run_command(["runs", str(dest)]) == 0
    assert "migrate" in capsys.readouterr().out
    assert run_command(["metrics", str(dest)]) == 0
    assert 'kind="migrate"' in capsys.readouterr().out
