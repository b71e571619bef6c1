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
        (_model(num_experts=[2]), CorruptArchiveError, "of no layer, expert and rank"),
        (_model(num_experts=[2, -3]), CorruptArchiveError, "no numbers"),
        (_model(module=None), CorruptArchiveError, "no mapping `module`"),
        (_model(ds_autoep_layers=[{}]), CorruptArchiveError, "a layer without numbers"),
        (
            _model(ds_autoep_layers=[{"checkpoint_format": "zero3_partitioned"}]),
            UnsupportedFormatError,
            "ds_to_universal.py",
        ),
        (_put(LAST, [torch.ones(2)]), CorruptArchiveError, "no mapping"),
        (_put(LAST, {3: torch.ones(2)}), CorruptArchiveError, "not a name"),
        (_put(LAST, expert(0, 0)), OutputCollisionError, "is in layer_0_expert_0"),
        (_put(LAST, {"a.weight": torch.ones(2)}), OutputCollisionError, MODEL),
        (
            _put("mp_rank_01_model_states.pt", {"module": weights()}),
            IncompleteCheckpointError,
            "of 1 tensor-parallel ranks, 2 are there",
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


# -- tensor-parallel ranks -------------------------------------------------------------------------------


def _wide_experts(count: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(6)
    name = "mlp.deepspeed_moe.experts.deepspeed_experts.{}.dense_{}"
    shapes = {"h_to_4h.weight": (8, 3), "h_to_4h.bias": (8,), "4h_to_h.weight": (3, 8), "4h_to_h.bias": (3,)}
    return {name.format(e, n): torch.randn(s, generator=g) for e in range(count) for n, s in shapes.items()}


def _write_ranks(folder: Path, how: str, args: object = None) -> dict[str, torch.Tensor]:
    """Two tensor-parallel ranks, the experts sliced, copied, or one on each rank."""
    experts, dense = _wide_experts(), {"norm.weight": torch.arange(3.0)}
    for rank in range(2):
        model = {"module": dense, "mp_world_size": 2, "num_experts": [2], "args": args, "global_steps": 4}
        rules = {
            "tp_replicated_parameter_patterns": [r".*norm\.weight", r".*4h_to_h\.bias"],
            "parameter_with_row_parallelism_patterns": [r".*4h_to_h\.weight"],
        }
        write(folder / f"mp_rank_{rank:02d}_model_states.pt", {**model, "universal_checkpoint_info": rules})
        for number in range(2):
            own = {name: t.clone() for name, t in experts.items() if f"experts.{number}." in name}
            if how == "sliced":
                for name in own:
                    if not name.endswith("4h_to_h.bias"):
                        axis = int(name.endswith("4h_to_h.weight"))
                        own[name] = own[name].chunk(2, axis)[rank].clone()
            if how != "one each" or rank == number:
                write(folder / f"layer_0_expert_{number}_mp_rank_{rank:02d}_model_states.pt", own)
    return {**dense, **experts}


SLICED, COPIED = ({"enable_expert_tensor_parallelism": stated} for stated in (True, False))
SECOND = "layer_0_expert_0_mp_rank_01_model_states.pt"


@pytest.mark.parametrize(("how", "args"), [("sliced", SLICED), ("copied", COPIED), ("one each", None)])
def test_experts_of_several_tensor_parallel_ranks_become_whole(
    tmp_path: Path, how: str, args: object
) -> None:
    expected = _write_ranks(tmp_path / "run", how, args)
    manifest = ptbin.convert(str(tmp_path / "run"), str(tmp_path / "x.bin"))
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), expected)
    assert manifest["source"]["container"] == "deepspeed_experts"
    assert set(manifest["accounting"]["left_out"]) <= {"replica", "trainer_state"}


def _unequal(folder: Path) -> None:
    state = torch.load(folder / SECOND)
    next(iter(state.values())).add_(1)
    torch.save(state, folder / SECOND)


@pytest.mark.parametrize(
    ("how", "args", "damage", "message"),
    [
        ("sliced", SLICED, _remove(SECOND), f"experts are missing: {SECOND}"),
        ("copied", COPIED, _remove(SECOND), f"experts are missing: {SECOND}"),
        ("copied", COPIED, _unequal, "should be the same in layer_0_expert_0_mp_rank_00.* and .*_mp_rank_01"),
        ("sliced", None, lambda _: None, "nothing says whether .* is sliced"),
        (
            "one each",
            None,
            lambda folder: [path.unlink() for path in folder.glob("layer_*_mp_rank_01_*")],
            "experts are missing",
        ),
        (
            "copied",
            None,
            lambda folder: [path.unlink() for path in folder.glob("layer_*_mp_rank_01_*")],
            f"nothing says that they are whole .*{SECOND}",
        ),
    ],
)
def test_experts_of_some_ranks_are_refused(
    tmp_path: Path, how: str, args: object, damage: Callable[[Path], object], message: str
) -> None:
    _write_ranks(tmp_path / "run", how, args)
    damage(tmp_path / "run")
    with pytest.raises(IncompleteCheckpointError, match=message):
        ptbin.convert(str(tmp_path / "run"), str(tmp_path / "x.bin"))


# -- AutoEP ----------------------------------------------------------------------------------------------


def _write_auto(folder: Path, ranks: int = 1) -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
    """Two layers of fused experts; the layers' metadata and the model."""
    g = torch.Generator().manual_seed(7)
    whole: dict[str, torch.Tensor] = {}
    layers: list[dict[str, object]] = []
    for number, count in enumerate((3, 2)):
        prefix = f"model.layers.{number}.mlp.experts"
        rows = {n: torch.randn(count, 4, 5, generator=g).bfloat16() for n in ("w1", "w2", "w3")}
        whole |= {f"{prefix}.{name}": tensor for name, tensor in rows.items()}
        about = {"num_experts": count, "num_local_experts": count, "ep_size": 1}
        layers.append(
            {"moe_layer_id": number, "expert_key_prefix": prefix, "checkpoint_format": "per_expert_files"}
            | about
        )
        for row in range(count):
            own = {f"{prefix}.{name}.{row}": tensor[row].clone() for name, tensor in rows.items()}
            for rank in range(ranks):
                folded = {"folding": {"version": 1, "etp_size": 1}} if ranks > 1 else {}
                name = f"layer_{number}_expert_{row}_mp_rank_{rank:02d}_model_states.pt"
                write(folder / name, {**own, **folded})
    rules = {"tp_replicated_parameter_patterns": [".*"], "ds_autoep_layers": layers}
    for rank in range(ranks):
        model = {"module": weights(), "mp_world_size": ranks, "num_experts": [3, 2]}
        extra = {"ds_autoep_layers": layers, "universal_checkpoint_info": rules}
        write(folder / f"mp_rank_{rank:02d}_model_states.pt", {**model, **extra})
    return layers, {**weights(), **whole}


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_of_autoep_are_fused_again(tmp_path: Path, ranks: int) -> None:
    _, expected = _write_auto(tmp_path / "run", ranks)
    ptbin.convert(str(tmp_path / "run"), str(tmp_path / "x.bin"), ConvertOptions(verify="load"))
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), expected)


@pytest.mark.slow
def test_fused_experts_are_what_deepspeed_makes_of_them(tmp_path: Path) -> None:
    universal = pytest.importorskip("deepspeed.checkpoint.autoep_universal")
    layers, expected = _write_auto(tmp_path / "run")
    universal.consolidate_autoep_expert_files(str(tmp_path / "run"), str(tmp_path), layers)
    made = {
        path.parent.name: torch.load(path, weights_only=False)["param"]
        for path in (tmp_path / "zero").glob("*/fp32.pt")
    }
    assert_same_tensors(made, {name: t for name, t in expected.items() if ".experts." in name})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_remove(f"layer_0_expert_2_{MODEL}"), IncompleteCheckpointError, f"layer_0_expert_2_{MODEL}"),
        (
            _put(f"layer_0_expert_2_{MODEL}", {"model.layers.0.mlp.experts.w1.1": torch.ones(4, 5)}),
            CorruptArchiveError,
            "not a weight of expert 2",
        ),
        (
            _put(f"layer_0_expert_2_{MODEL}", {"model.layers.0.mlp.experts.w1.2": torch.ones(4, 5)}),
            CorruptArchiveError,
            "are 3 of 3, in 2 shapes",
        ),
    ],
)
def test_experts_of_autoep_that_are_not_whole_are_refused(
    tmp_path: Path, change: Callable[[Path], None], error: type[PtbinError], message: str
) -> None:
    _write_auto(tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(error, match=message):
        ptbin.convert(str(tmp_path / "run"), str(tmp_path / "x.bin"))


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
