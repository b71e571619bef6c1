"""The restore flow over a store of outputs of every kind; one that does not fit spoils itself only."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from flows.restore import restore
from ptbin import ConvertOptions
from ptbin.runs.run_ids import new_run_id
from ptbin.stores.local import LocalStore
from tasks.live import LiveRun, open_live_run
from tests.bits import assert_same_tensors

pytestmark = [pytest.mark.usefixtures("server"), pytest.mark.filterwarnings("ignore")]

STATE_DICT = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with one output of each kind."""
    source = tmp_path / "source.pt"
    torch.save(STATE_DICT, source)
    folder = tmp_path / "weights"
    ptbin.convert(str(source), str(folder / "plain.bin"))
    ptbin.convert(str(source), str(folder / "raw" / "x.bin"), ConvertOptions(format="raw"))
    ptbin.convert(str(source), str(folder / "shards" / "x.bin"), ConvertOptions(max_shard_size=10))
    ptbin.convert(str(source), str(folder / "hub" / "x.safetensors"), ConvertOptions(format="safetensors"))
    return folder


def run(source: Path, dest: Path, **parameters: Any) -> tuple[Any, dict[str, Any]]:
    with open_live_run(LiveRun(new_run_id())) as live:
        state = restore(str(source), str(dest), run_id=live.run_id, return_state=True, **parameters)
        return state, live.summary


def test_every_kind_of_output_comes_back_once(weights: Path, tmp_path: Path) -> None:
    dest = tmp_path / "back"
    state, summary = run(weights, dest)
    assert state.message == "converted 4, up to date 0, rejected 0, failed 0"
    for name in ("plain.pt", "raw/x.pt", "shards/x.pt", "hub/x.pt"):
        assert_same_tensors(torch.load(dest / name, weights_only=True), STATE_DICT)
        assert ptbin.verify(str(dest / f"{name}.manifest.json")) == []
    assert len(summary["manifests"]) == 4
    again, _ = run(weights, dest)
    assert again.message == "converted 0, up to date 4, rejected 0, failed 0"


def test_a_training_checkpoint_in_its_way_stays(weights: Path, tmp_path: Path) -> None:
    dest = tmp_path / "checkpoints"
    (dest / "raw").mkdir(parents=True)
    torch.save({"state_dict": STATE_DICT, "optimizer": {}}, dest / "plain.pt")
    before = (dest / "plain.pt").read_bytes()
    state, summary = run(weights, dest)
    assert (state.message or "").splitlines()[0] == "converted 3, up to date 0, rejected 1, failed 0"
    assert [problem["reason"] for problem in summary["problems"]] == ["output_exists"]
    assert (dest / "plain.pt").read_bytes() == before
    assert not (dest / "plain.pt.manifest.json").exists()
    forced, _ = run(weights, dest, force=True)
    assert forced.message == "converted 4, up to date 0, rejected 0, failed 0"


def test_what_the_listing_shows_to_be_free_is_not_asked_for(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    stat = LocalStore.stat

    def counted(self: LocalStore, path: str) -> Any:
        asked.append(path)
        return stat(self, path)

    monkeypatch.setattr(LocalStore, "stat", counted)
    dest = tmp_path / "dest"
    dest.mkdir()
    run(weights, dest)
    assert [path for path in asked if path.startswith(str(dest)) and path.endswith(".pt")] == []


def test_a_model_is_built_for_each_and_what_does_not_fit_is_rejected(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "flow_nets.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            def linear():
                return nn.Linear(3, 2)
            """
        )
    )
    torch.save({"other": torch.ones(3)}, tmp_path / "other.pt")
    ptbin.convert(str(tmp_path / "other.pt"), str(weights / "other.bin"))
    dest = tmp_path / "modules"
    state, summary = run(
        weights,
        dest,
        model="flow_nets:linear",
        model_path=str(tmp_path / "src"),
        include=["plain.bin", "other.bin"],
    )
    assert state.is_failed()
    assert (state.message or "").splitlines()[0] == "converted 1, up to date 0, rejected 1, failed 0"
    assert [problem["reason"] for problem in summary["problems"]] == ["model_mismatch"]
    assert not (dest / "other.pt").exists()
    module = torch.load(dest / "plain.pt", weights_only=False)
    assert_same_tensors(dict(module.state_dict()), STATE_DICT)
