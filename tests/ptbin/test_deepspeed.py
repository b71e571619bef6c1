"""DeepSpeed folders: what ptbin finds is what DeepSpeed's own `zero_to_fp32` makes of them, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import ptbin
from ptbin.reading.pickle.verdicts import judge_programs
from tests.bits import assert_same_tensors, same_bits
from tests.checkpoints.deepspeed_zero import VARIANTS, consolidated, train
from tests.deepspeed_folders import needs_deepspeed, read, tensors_in


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Every variant on two ranks, some on three."""
    needs_deepspeed()
    made = train(tmp_path_factory.mktemp("deepspeed"), {2: list(VARIANTS), 3: ["stage2", "stage3_subgroups"]})
    return {**made[2], **{f"{name}_of_three": path for name, path in made[3].items()}}


REAL = (*VARIANTS, "stage2_of_three", "stage3_subgroups_of_three")


@pytest.mark.starts_processes
@pytest.mark.parametrize("variant", REAL)
def test_is_what_zero_to_fp32_finds(trained: Mapping[str, Path], variant: str) -> None:
    tag = trained[variant]
    checkpoint = read(tag)
    found, expected = tensors_in(checkpoint, tag), consolidated(tag)
    extra = {"frozen.weight", "frozen.bias"} if variant == "stage1" else set()  # which it loses
    assert found.keys() - expected.keys() == extra
    assert_same_tensors({name: found[name] for name in expected}, expected)
    assert checkpoint.container == "deepspeed_zero"
    assert checkpoint.archive_root is None
    assert judge_programs(checkpoint.programs).verdict == "unknown"


@pytest.mark.starts_processes
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "stage3" not in name])
def test_masters_round_to_the_weights_that_were_trained(trained: Mapping[str, Path], variant: str) -> None:
    """A second oracle: rounded to 16 bits, every master is the module's own parameter."""
    tag = trained[variant]
    checkpoint = read(tag)
    found, module = tensors_in(checkpoint, tag), tensors_in(checkpoint, tag, "module")
    assert sorted(found) == sorted(module)
    for name, tensor in found.items():
        assert same_bits(tensor.to(module[name].dtype), module[name]), name
    loaded = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)
    assert_same_tensors(module, loaded["module"])


@pytest.mark.starts_processes
@pytest.mark.parametrize("variant", REAL)
def test_ties_stay_ties(trained: Mapping[str, Path], variant: str) -> None:
    fp32 = read(trained[variant]).root.get("fp32").by_name()
    assert fp32["head.weight"] is fp32["embedding.weight"]


@pytest.mark.starts_processes
@pytest.mark.parametrize("variant", ["stage3", "stage3_subgroups"])
def test_stage_3_offers_no_module(trained: Mapping[str, Path], variant: str) -> None:
    assert read(trained[variant]).root.get("module") is None


@pytest.mark.starts_processes
@pytest.mark.parametrize("variant", REAL)
def test_converts(trained: Mapping[str, Path], variant: str, tmp_path: Path) -> None:
    tag = trained[variant]
    expected = tensors_in(read(tag), tag)
    manifest = ptbin.convert(str(tag), str(tmp_path / "x.bin"))
    assert manifest["selected"] == "fp32"
    assert manifest["source"]["container"] == "deepspeed_zero"
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), expected)


@pytest.mark.starts_processes
def test_module_can_be_selected(trained: Mapping[str, Path], tmp_path: Path) -> None:
    tag = trained["stage2"]
    ptbin.convert(str(tag), str(tmp_path / "x.bin"), ptbin.ConvertOptions(select="module"))
    loaded = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), loaded["module"])
