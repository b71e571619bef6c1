"""DeepSpeed's own model-parallel folders, held against what DeepSpeed itself makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ptbin
from tests.bits import assert_same_tensors
from tests.checkpoints.deepspeed_ranks import EXPERTS, TAG, train

pytestmark = [pytest.mark.slow, pytest.mark.starts_processes, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    return train(tmp_path_factory.mktemp("deepspeed") / "made")


def _converted(source: Path, out: Path) -> dict[str, torch.Tensor]:
    ptbin.convert(str(source), str(out))
    found: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
    return found


def _held(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"held_{rank}.pt", weights_only=True) for rank in range(2)]


def test_ranks_without_zero_are_what_deepspeed_gathers(made: Path, tmp_path: Path) -> None:
    expected = torch.load(made / "tp0" / "whole.bin", weights_only=True)
    assert_same_tensors(_converted(made / "tp0", tmp_path / "x.bin"), expected)


@pytest.mark.parametrize("kind", ["tp1", "tp3"])
def test_masters_are_what_ds_to_universal_gives(made: Path, tmp_path: Path, kind: str) -> None:
    zero = made / kind / f"{TAG}_universal" / "zero"
    expected = {
        path.parent.name: torch.load(path, weights_only=True)["param"] for path in zero.glob("*/fp32.pt")
    }
    found = _converted(made / kind / TAG, tmp_path / "x.bin")
    frozen = {name for name in found if name not in expected}
    assert frozen <= {"model.norm.weight"}  # which no optimizer holds
    assert_same_tensors({name: t for name, t in found.items() if name not in frozen}, expected)
    again = _converted(zero.parent, tmp_path / "y.bin")
    assert_same_tensors({name: again[name] for name in expected}, expected)


def test_a_pipeline_is_what_its_stages_hold(made: Path, tmp_path: Path) -> None:
    first, second = _held(made / "pipeline")
    found = _converted(made / "pipeline", tmp_path / "x.bin")
    tied = first.pop("tied_modules.embed.weight")
    second.pop("tied_modules.embed.weight")
    assert_same_tensors(found, {**first, **second, "0.weight": tied, "5.weight": tied})


def test_experts_under_zero_are_what_the_ranks_hold(made: Path, tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for rank, held in enumerate(_held(made / "experts")):
        expected |= {name.replace(f"{EXPERTS}0.", f"{EXPERTS}{rank}."): t for name, t in held.items()}
    assert_same_tensors(_converted(made / "experts", tmp_path / "x.bin"), expected)
