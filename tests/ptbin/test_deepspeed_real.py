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
    expected = torch.load(made / "tp0" / "whole.pt", weights_only=True)
    assert_same_tensors(_converted(made / "tp0", tmp_path / "x.bin"), expected)


@pytest.mark.parametrize("kind", ["tp1", "tp3"])
def test_masters_are_what_ds_to_universal_gives(made: Path, tmp_path: Path, kind: str) -> None:
    zero = made / kind / f"{TAG}_universal" / "zero"
    expected = {
        path.parent.name: torch.load(path, weights_only=True)["param"] for path in zero.glob("*/fp32.pt")
    }
    found = _converted(made / kind / TAG, tmp_path / "x.bin")
    # What no optimizer holds keeps its type, as `zero_to_fp32` has it.
    norm = found.pop("model.norm.weight")
    assert norm.dtype == torch.bfloat16
    assert torch.equal(expected.pop("model.norm.weight", norm.float()), norm.float())
    assert_same_tensors(found, expected)
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
