"""A training folder converts, mirrors and migrates without a failure; what is left alone is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.convert import convert
from flows.migrate import migrate
from flows.sync import sync
from ptbin.runs.run_ids import new_run_id
from tasks.live import LiveRun, open_live_run
from tests.checkpoints.leftovers import leftovers, write_training_folder
from tests.checkpoints.parts import FOLDERS

pytestmark = pytest.mark.usefixtures("server")


def run(flow: Callable[..., Any], source: Path, dest: Path, **parameters: Any) -> tuple[Any, dict[str, Any]]:
    with open_live_run(LiveRun(new_run_id())) as live:
        state = flow(source=str(source), dest=str(dest), run_id=live.run_id, return_state=True, **parameters)
    return state, live.summary


def record_of(dest: Path) -> dict[str, Any]:
    (path,) = dest.rglob("run.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("flow", [convert, sync])
def test_a_training_folder_is_a_success(tmp_path: Path, flow: Callable[..., Any]) -> None:
    count = write_training_folder(tmp_path / "in" / "checkpoint-500")
    torch.save(leftovers()["optimizer.pt"][1], tmp_path / "in" / "adam_500.pt")  # known by its content alone
    state, summary = run(flow, tmp_path / "in", tmp_path / "out")
    assert state.is_completed()
    assert (summary["converted"], summary["left_alone"], summary["rejected"]) == (1, count + 1, 0)
    assert summary["problems"] == []
    assert f"left alone {count + 1}" in state.message
    assert [path.name for path in (tmp_path / "out").rglob("*.bin")] == ["pytorch_model.bin"]
    record = record_of(tmp_path / "out")
    assert record["left_alone"] == count + 1
    details = {row["path"]: row["detail"] for row in record["checkpoints"] if row["outcome"] == "left_alone"}
    assert details["checkpoint-500/scaler.pt"] == "scaler"
    assert details["adam_500.pt"] == "optimizer"
    again, summary = run(flow, tmp_path / "in", tmp_path / "out")
    assert again.is_completed()
    assert (summary["converted"], summary["rejected"], summary["left_alone"]) == (0, 0, count + 1)


def test_a_version_with_leftovers_is_migrated(tmp_path: Path) -> None:
    count = write_training_folder(tmp_path / "in" / "net" / "1")
    state, summary = run(migrate, tmp_path / "in", tmp_path / "out")
    assert state.is_completed()
    assert (summary["migrated"], summary["left_alone"]) == (1, count)
    assert record_of(tmp_path / "out")["left_alone"] == count


def test_a_folder_in_parts_is_one_problem_of_a_run(tmp_path: Path) -> None:
    FOLDERS["deepspeed experts, no model"](tmp_path / "in" / "moe")
    FOLDERS["meta"](tmp_path / "in" / "llama")
    state, summary = run(convert, tmp_path / "in", tmp_path / "out")
    assert state.is_failed()
    assert [problem["reason"] for problem in summary["problems"]] == ["incomplete_checkpoint"] * 2
    assert summary["left_alone"] == 0  # the experts' optimizer belongs to what is refused
    assert not list((tmp_path / "out").rglob("*.bin"))
    state, summary = run(convert, tmp_path / "in", tmp_path / "out", parts=True)
    assert state.is_completed()
    assert (summary["converted"], summary["left_alone"]) == (4, 1)
    for path in (tmp_path / "out").rglob("*.manifest.json"):
        assert json.loads(path.read_text())["part"]
