"""DeepSpeed's mixtures of experts: one model with its experts, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ptbin
from ptbin import ConvertOptions, catalog
from ptbin.errors import (
    CorruptArchiveError,
    IncompleteCheckpointError,
    OutputCollisionError,
    PtbinError,
    UnsupportedFormatError,
)
from tests.bits import assert_same_tensors
from tests.checkpoints.deepspeed_experts import train
from tests.checkpoints.parts import expert, weights, write, write_experts

pytestmark = pytest.mark.filterwarnings("ignore")

MODEL = "mp_rank_00_model_states.pt"


def test_a_folder_is_one_model_with_its_experts(tmp_path: Path) -> None:
    expected = write_experts(tmp_path / "run" / "global_step2")
    (tmp_path / "run" / "latest").write_text("global_step2")
    for place in ("run", "run/global_step2"):
        manifest = ptbin.convert(
            str(tmp_path / place), str(tmp_path / "x.bin"), ConvertOptions(verify="load")
        )
        assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), expected)
        assert (manifest["source"]["container"], manifest["selected"]) == ("deepspeed_experts", "module")
    found = [item.path for item in catalog.find_checkpoints(str(tmp_path / "run")) if item.certain]
    assert found == ["global_step2"]
    assert manifest["accounting"]["left_out"]["optimizer"] > 0
    assert ptbin.inspect(str(tmp_path / "run"))["selected"] == "module"


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _put(name: str, content: object) -> Callable[[Path], None]:
    return lambda folder: write(folder / name, content)


def _model(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = torch.load(folder / MODEL, weights_only=True)
        torch.save({**content, **changes}, folder / MODEL)

    return change


LAST = f"layer_1_expert_2_{MODEL}"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_remove(LAST), IncompleteCheckpointError, f"experts are missing: {LAST}"),
        (_remove(MODEL), IncompleteCheckpointError, "mp_rank_00_model_states.pt is missing"),
        (_model(num_experts=[2, 1 << 19]), IncompleteCheckpointError, "expert_7_.*, \\.\\.\\.;"),
        (_model(num_experts=[2]), CorruptArchiveError, "of no layer and expert"),
        (_model(num_experts=[2, -3]), CorruptArchiveError, "no numbers"),
        (_model(module=None), CorruptArchiveError, "no mapping `module`"),
        (_model(ds_autoep_layers=[{}]), UnsupportedFormatError, "AutoEP"),
        (_put(LAST, [torch.ones(2)]), CorruptArchiveError, "no mapping"),
        (_put(LAST, {3: torch.ones(2)}), CorruptArchiveError, "not a name"),
        (_put(LAST, expert(0, 0)), OutputCollisionError, "is in layer_0_expert_0"),
        (_put(LAST, {"a.weight": torch.ones(2)}), OutputCollisionError, MODEL),
        (
            _put("mp_rank_01_model_states.pt", {"module": weights()}),
            IncompleteCheckpointError,
            "mp_rank_01_model_states.pt next to experts",
        ),
        (_put("layer_00-model_00-model_states.pt", weights()), IncompleteCheckpointError, "pipeline"),
    ],
)
def test_what_is_not_whole_is_refused(
    tmp_path: Path, change: Callable[[Path], None], error: type[PtbinError], message: str
) -> None:
    folder = tmp_path / "run"
    write_experts(folder)
    change(folder)
    with pytest.raises(error, match=message):
        ptbin.convert(str(folder), str(tmp_path / "x.bin"))


def test_experts_next_to_zero_partitions_are_whole_in_their_own_files(tmp_path: Path) -> None:
    expected = write_experts(tmp_path / "run")
    for rank in range(2):
        zero = {"optimizer_state_dict": {"zero_stage": 1, "partition_count": [2, 1]}, "flat": torch.ones(70)}
        write(tmp_path / "run" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", zero)
    manifest = ptbin.convert(str(tmp_path / "run"), str(tmp_path / "x.bin"))
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), expected)
    (row,) = [row for row in manifest["left_out"] if row["role"] == "optimizer" and row["nbytes"]]
    assert row["path"] == "expp_rank_0_mp_rank_00_optim_states.pt and 2 more (not opened)"


@pytest.mark.starts_processes
@pytest.mark.slow
def test_what_deepspeed_saves_is_what_its_ranks_hold(tmp_path: Path) -> None:
    folder, expected = train(tmp_path)
    ptbin.convert(str(folder), str(tmp_path / "x.bin"))
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), expected)
