"""DeepSpeed's model-parallel folders: tensor-parallel ranks, pipelines, universal checkpoints.

Real ones, and what DeepSpeed's own tools make of them, are in `test_deepspeed_real.py`.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin import ConvertOptions, catalog
from ptbin.errors import (
    CorruptArchiveError,
    IncompleteCheckpointError,
    PtbinError,
    UnsupportedFormatError,
    UnsupportedTensorError,
)
from tests.bits import assert_same_tensors
from tests.checkpoints.deepspeed_slices import (
    bloom_layers,
    neox_layers,
    write_layers,
    write_ranks,
    write_universal,
    write_zero_ranks,
)

pytestmark = pytest.mark.filterwarnings("ignore")

Written = dict[str, torch.Tensor]


def converted(folder: Path, **options: Any) -> tuple[Written, dict[str, Any]]:
    out = folder.parent / "out.bin"
    manifest = ptbin.convert(str(folder), str(out), ConvertOptions(verify="load", **options))
    return torch.load(out, weights_only=True), manifest


def roles(manifest: dict[str, Any]) -> dict[str, int]:
    left: dict[str, int] = manifest["accounting"]["left_out"]
    return left


# -- tensor-parallel ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_become_whole_by_every_rule(tmp_path: Path, ranks: int) -> None:
    whole = write_ranks(tmp_path / "run", ranks)
    found, manifest = converted(tmp_path / "run")
    assert_same_tensors(found, whole)
    assert manifest["source"]["container"] == "deepspeed_ranks"
    assert set(roles(manifest)) == {"optimizer", "replica", "padding"}
    assert roles(manifest)["padding"] == 2 * 5 * 4
    names = [item.path for item in catalog.find_checkpoints(str(tmp_path)) if item.certain]
    assert "run" in names
    assert not any(name.startswith("run/") for name in names)


@pytest.mark.parametrize(("stage", "world_size"), [(1, 1), (2, 3), (3, 2)])
def test_masters_of_ranks_under_zero_become_whole(tmp_path: Path, stage: int, world_size: int) -> None:
    whole = write_zero_ranks(tmp_path / "run", 2, stage=stage, world_size=world_size)
    found, _ = converted(tmp_path / "run")
    assert_same_tensors(found, whole)
    if stage < 3:
        found, _ = converted(tmp_path / "run", select=("module",))
        assert_same_tensors(found, {name: tensor.bfloat16() for name, tensor in whole.items()})


def test_one_rank_by_itself_is_incomplete(tmp_path: Path) -> None:
    write_ranks(tmp_path / "run", 2)
    name = "mp_rank_01_model_states.pt"
    with pytest.raises(IncompleteCheckpointError, match="convert the folder"):
        ptbin.convert(str(tmp_path / "run" / name), str(tmp_path / "x.bin"))
    ptbin.convert(str(tmp_path / "run" / name), str(tmp_path / "x.bin"), ConvertOptions(parts=True))


def _info(**changes: Any) -> Callable[[int, dict[str, Any]], None]:
    return lambda _, states: states["universal_checkpoint_info"].update(changes)


def _of_rank_1(change: Callable[[dict[str, Any]], object]) -> Callable[[int, dict[str, Any]], None]:
    def apply(rank: int, states: dict[str, Any]) -> None:
        if rank == 1:
            change(states)

    return apply


def _scaled_by(scale: Any, moved: float = 0.0) -> Callable[[int, dict[str, Any]], None]:
    """The norm as a row-parallel layer keeps its bias: on every rank, divided by the number of ranks."""

    def change(rank: int, states: dict[str, Any]) -> None:
        norm = states["module"]["norm.weight"]
        states["module"]["norm.weight"] = norm * scale + moved * rank if isinstance(scale, float) else norm
        piece = {"shape": [5], "source": [0, [1]], "dest": [0, [1]], "locations": [0, 1], "scale": scale}
        ranks = {n: {"shard_shape": [5], "pieces": [dict(piece)]} for n in range(2)}
        params = states["universal_checkpoint_info"]["affine_map"]["params"]
        params[r"^norm\.weight$"] = {"logical_shape": [5], "ranks": ranks}

    return change


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scaled_copies_are_computed_as_torch_does(tmp_path: Path, dtype: torch.dtype) -> None:
    def change(rank: int, states: dict[str, Any]) -> None:
        states["module"] = {name: tensor.to(dtype) for name, tensor in states["module"].items()}
        _scaled_by(1 / 3)(rank, states)

    whole = write_ranks(tmp_path / "run", 2, change)
    found, manifest = converted(tmp_path / "run")
    expected = whole["norm.weight"].to(dtype) * (1 / 3) / (1 / 3)
    assert_same_tensors({"norm.weight": found["norm.weight"]}, {"norm.weight": expected})
    told = {row["role"]: row["reason"] for row in manifest["left_out"]}
    assert "computed, not copied" in told["scaled"]


def _shifted(_: int, states: dict[str, Any]) -> None:
    entry = states["universal_checkpoint_info"]["affine_map"]["params"][r"^grouped\.weight$"]
    entry["ranks"][0]["pieces"][0]["source"][0] = 5


REFUSED: list[tuple[Any, type[PtbinError], str]] = [
    (
        _of_rank_1(lambda s: s.update(global_steps=8)),
        IncompleteCheckpointError,
        "mp_rank_01.* says global_steps 8",
    ),
    (
        _of_rank_1(lambda s: s["module"]["norm.weight"].add_(1)),
        IncompleteCheckpointError,
        "'norm.weight' should be the same in mp_rank_00.* and mp_rank_01",
    ),
    (
        _of_rank_1(lambda s: s["module"]["grouped.weight"][-1].add_(1)),
        IncompleteCheckpointError,
        "'grouped.weight' should be the same",
    ),
    (
        _of_rank_1(lambda s: s["module"].pop("up.bias")),
        IncompleteCheckpointError,
        "'up.bias' is in mp_rank_00",
    ),
    (
        _of_rank_1(lambda s: s["module"].update(x=torch.ones(2))),
        IncompleteCheckpointError,
        "'x' is in mp_rank_01",
    ),
    (_of_rank_1(lambda s: s.update(module=None)), CorruptArchiveError, "mp_rank_01.* no mapping `module`"),
    (_info(affine_map={"version": 2, "params": {}}), UnsupportedFormatError, "version 2"),
    (
        _info(autotp_unsupported_parameter_patterns={r"^up\.bias$": "why"}),
        UnsupportedTensorError,
        "'up.bias'",
    ),
    (_info(tp_replicated_parameter_patterns=["(a+)+$"]), UnsupportedFormatError, "long to match"),
    (_info(tp_replicated_parameter_patterns=[".*.*.*.*x"]), UnsupportedFormatError, "long to match"),
    (_info(tp_replicated_parameter_patterns=["("]), UnsupportedFormatError, "not a pattern"),
    (_info(sub_param_shard_widths={}), CorruptArchiveError, "widths of the sub-parameters of 'qkv.weight'"),
    (_scaled_by(0.5, 1.0), IncompleteCheckpointError, "'norm.weight' should be the same in mp_rank_00"),
    (_scaled_by(0.0), CorruptArchiveError, "scaled by 0.0"),
    (_scaled_by(float("nan")), CorruptArchiveError, "scaled by nan"),
    (_scaled_by("a half"), CorruptArchiveError, "scaled by a half"),
    (_shifted, CorruptArchiveError, "'grouped.weight' overlap"),
    (lambda _, s: s.pop("universal_checkpoint_info"), IncompleteCheckpointError, "nothing says how 2 parts"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_ranks_that_do_not_go_together_are_refused(
    tmp_path: Path, change: Any, error: type[PtbinError], message: str
) -> None:
    write_ranks(tmp_path / "run", 2, change)
    with pytest.raises(error, match=message):
        converted(tmp_path / "run")
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank_is_named(tmp_path: Path, rank: int) -> None:
    write_ranks(tmp_path / "run", 3)
    (tmp_path / "run" / f"mp_rank_{rank:02d}_model_states.pt").unlink()
    with pytest.raises(IncompleteCheckpointError, match=f"mp_rank_{rank:02d}|3 tensor-parallel ranks"):
        converted(tmp_path / "run")


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["ranks", "layers", "universal"])
def test_a_truncated_file_is_named(tmp_path: Path, kind: str) -> None:
    if kind == "ranks":
        write_ranks(tmp_path / "run", 2)
        path = tmp_path / "run" / "mp_rank_01_model_states.pt"
    elif kind == "layers":
        write_layers(tmp_path / "run", _bloom()[1], 2, count=2)
        path = tmp_path / "run" / "layer_04-model_01-model_states.pt"
    else:
        write_universal(tmp_path / "run", stage=1)
        path = tmp_path / "run" / "global_step2" / "zero" / "a.bias" / "fp32.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CorruptArchiveError, match=path.name):
        converted(path.parents[2] if kind == "universal" else path.parent)


# -- pipelines -------------------------------------------------------------------------------------------


def _neox(dtype: torch.dtype = torch.float16) -> tuple[Any, dict[int, Written]]:
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(1)
    sizes = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 4}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, num_hidden_layers=2)).to(
        dtype
    )
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    return model, neox_layers(model.state_dict(), 2)


def _bloom() -> tuple[Any, dict[int, Written]]:
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(1)
    model = transformers.BloomModel(
        transformers.BloomConfig(vocab_size=24, hidden_size=8, n_layer=2, n_head=2)
    )
    return model, bloom_layers(model.state_dict(), 2)


@pytest.mark.thorough
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_transformers_reads_the_layers_of_gpt_neox(tmp_path: Path, ranks: int) -> None:
    model, layers = _neox()
    write_layers(tmp_path / "run", layers, ranks, count=2, summed=True)
    found, manifest = converted(tmp_path / "run", recipe="neox-hf")
    again = type(model)(model.config).half()
    # its name on the Hub and before transformers 5
    found["lm_head.weight"] = found.pop("embed_out.weight")
    again.load_state_dict(found, strict=True)
    tokens = torch.arange(6).reshape(1, 6)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert manifest["source"]["container"] == "deepspeed_layers"
    assert ("summed" in roles(manifest)) == (ranks > 1)
    assert roles(manifest)["optimizer"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_and_means_are_those_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    _, layers = _neox(dtype)
    write_layers(tmp_path / "run", layers, 3, count=2)
    g = torch.Generator().manual_seed(4)
    held: dict[str, list[torch.Tensor]] = {}
    for rank in range(3):
        path = tmp_path / "run" / f"layer_02-model_{rank:02d}-model_states.pt"
        state = torch.load(path)
        for name in ("attention.dense.bias", "input_layernorm.weight"):
            state[name] = torch.randn(8, generator=g).to(dtype)
            held.setdefault(name, []).append(state[name])
        torch.save({k: v for k, v in state.items() if v.dim() == 1}, path)
    found, manifest = converted(tmp_path / "run")
    bias, norm = held["attention.dense.bias"], held["input_layernorm.weight"]
    expected: dict[str, Any] = {
        "2.attention.dense.bias": sum(bias),
        "2.input_layernorm.weight": sum(norm) / 3,
    }
    assert_same_tensors({name: found[name] for name in expected}, expected)
    assert {"summed", "averaged"} <= set(roles(manifest))
    told = {row["role"]: row["reason"] for row in manifest["left_out"]}
    assert "computed, not copied" in told["summed"]


def test_transformers_reads_the_layers_of_bloom(tmp_path: Path) -> None:
    model, layers = _bloom()
    write_layers(tmp_path / "run", layers, 2, count=2)
    found, manifest = converted(tmp_path / "run", recipe="bloom-hf")
    assert_same_tensors(found, model.state_dict())
    assert set(roles(manifest)) == {"optimizer", "replica"}


def test_gpt_neox_without_a_pipeline_has_one_file_for_each_rank(tmp_path: Path) -> None:
    model, layers = _neox()
    write_layers(tmp_path / "layers", layers, 2, count=2)
    (tmp_path / "run").mkdir()
    for rank in range(2):
        module = {}
        for layer in layers:
            own = torch.load(tmp_path / "layers" / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
            module.update({f"sequential.{layer}.{name}": value for name, value in own.items()})
        module = {n: t / 2 if n.endswith(("dense.bias", "4h_to_h.bias")) else t for n, t in module.items()}
        states = {"module": module, "mp_world_size": 2, "ds_version": "0.3.15", "global_steps": 1}
        torch.save(states, tmp_path / "run" / f"mp_rank_{rank:02d}_model_states.pt")
    found, _ = converted(tmp_path / "run", recipe="neox-hf")
    state = {name.replace("lm_head", "embed_out"): value for name, value in model.state_dict().items()}
    assert_same_tensors(found, state)


def _without(folder: Path, layer: int) -> None:
    for path in folder.glob(f"layer_{layer:02d}-*"):
        path.unlink()


@pytest.mark.parametrize("count", [2, None])
@pytest.mark.parametrize("layer", [0, 2, 3, 5, 6])
def test_a_missing_layer_is_named(tmp_path: Path, layer: int, count: int | None) -> None:
    write_layers(tmp_path / "run", _neox()[1], 2, count=count)
    _without(tmp_path / "run", layer)
    with pytest.raises(
        IncompleteCheckpointError, match=f"layer_{layer:02d}-model_00-model_states.pt is missing"
    ):
        converted(tmp_path / "run")


@pytest.mark.parametrize("layer", [1, 3, 4, 6])
def test_a_missing_layer_of_bloom_is_named(tmp_path: Path, layer: int) -> None:
    write_layers(tmp_path / "run", _bloom()[1], 2)
    _without(tmp_path / "run", layer)
    with pytest.raises(
        IncompleteCheckpointError, match=f"layer_{layer:02d}-model_00-model_states.pt is missing"
    ):
        converted(tmp_path / "run")


def _mixed_layers() -> dict[int, dict[str, torch.Tensor]]:
    """A pipeline of no known family."""
    g = torch.Generator().manual_seed(8)
    rows = {0: 3, 1: 4, 2: 5, 4: 6}
    return {
        layer: {"weight": torch.randn(n, 2, generator=g), "bias": torch.ones(n)} for layer, n in rows.items()
    }


OPTIMIZERS: dict[str, Any] = {
    "parameters": {"state": {}, "param_groups": [{"params": list(range(6))}, {"params": [6, 7]}]},
    "elements": {"fp32_groups_flat": [torch.zeros(50), torch.zeros(4)], "optimizer_state_dict": {}},
}


@pytest.mark.parametrize("told", OPTIMIZERS)
def test_an_optimizer_shows_that_all_layers_are_here(tmp_path: Path, told: str) -> None:
    write_layers(tmp_path / "run", _mixed_layers(), 1, optimizer=OPTIMIZERS[told])
    found, _ = converted(tmp_path / "run")
    expected = {f"{n}.{name}": t for n, own in _mixed_layers().items() for name, t in own.items()}
    assert_same_tensors(found, expected)
    for layer in _mixed_layers():
        shutil.copytree(tmp_path / "run", tmp_path / f"{layer}" / "run")
        _without(tmp_path / f"{layer}" / "run", layer)
        with pytest.raises(IncompleteCheckpointError, match=rf"has \d+ {told}, the layers \d+\): if "):
            converted(tmp_path / f"{layer}" / "run")


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_layers_that_nothing_counts_are_taken_with_parts(tmp_path: Path, layer: int) -> None:
    write_layers(tmp_path / "run", _mixed_layers(), 1)
    with pytest.raises(IncompleteCheckpointError, match=r"if layer_03-.* or layer_05-.* is missing"):
        converted(tmp_path / "run")
    _without(tmp_path / "run", layer)
    named = 3 if layer == 4 else layer  # behind the last one: the next number
    with pytest.raises(IncompleteCheckpointError, match=f"layer_{named:02d}-model_00-model_states"):
        converted(tmp_path / "run")
    assert len(converted(tmp_path / "run", parts=True)[0]) == 6


def test_missing_model_states_of_a_stage_are_named(tmp_path: Path) -> None:
    write_layers(tmp_path / "run", _neox()[1], 2, count=2)
    (tmp_path / "run" / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(IncompleteCheckpointError, match=r"mp_rank_01_model_states\.pt is missing of 2"):
        converted(tmp_path / "run")


def test_model_states_of_another_step_are_named(tmp_path: Path) -> None:
    write_layers(tmp_path / "run", _neox()[1], 2, count=2)
    path = tmp_path / "run" / "mp_rank_01_model_states.pt"
    torch.save({**torch.load(path, weights_only=False), "global_steps": 4}, path)
    with pytest.raises(IncompleteCheckpointError, match=r"mp_rank_01_model_states\.pt says global_steps 4"):
        converted(tmp_path / "run")


def test_a_missing_rank_of_a_layer_is_named(tmp_path: Path) -> None:
    write_layers(tmp_path / "run", _neox()[1], 2, count=2)
    (tmp_path / "run" / "layer_02-model_01-model_states.pt").unlink()
    with pytest.raises(IncompleteCheckpointError, match=r"layer_02-model_01-model_states\.pt is missing"):
        converted(tmp_path / "run")


@pytest.mark.parametrize(("renamed", "names"), [("0", ("00", "01")), ("1", ("01", "00"))])
def test_ranks_of_a_layer_that_hold_different_names_are_not_of_one_save(
    tmp_path: Path, renamed: str, names: tuple[str, str]
) -> None:
    """A name in the first rank alone, or in the second alone: neither is left out."""
    write_layers(tmp_path / "run", _neox()[1], 2, count=2)
    path = tmp_path / "run" / f"layer_02-model_0{renamed}-model_states.pt"
    torch.save({**torch.load(path), "more.weight": torch.ones(3)}, path)
    has, lacks = (f"layer_02-model_{rank}-model_states.pt" for rank in names)
    expected = rf"'more\.weight' is in {has} and not in {lacks}"
    with pytest.raises(IncompleteCheckpointError, match=expected):
        converted(tmp_path / "run")


def test_one_layer_by_itself_is_incomplete(tmp_path: Path) -> None:
    write_layers(tmp_path / "run", _neox()[1], 1, count=2)
    path = tmp_path / "run" / "layer_02-model_00-model_states.pt"
    with pytest.raises(IncompleteCheckpointError, match="each a layer or less"):
        ptbin.convert(str(path), str(tmp_path / "x.bin"))


# -- universal checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 3])
def test_a_universal_checkpoint_is_its_masters(tmp_path: Path, stage: int) -> None:
    whole = write_universal(tmp_path / "run", stage=stage)
    found, manifest = converted(tmp_path / "run" / "global_step2")
    assert_same_tensors(found, whole)
    assert found["tied"].data_ptr() == found["a.weight"].data_ptr()
    assert manifest["source"]["container"] == "deepspeed_universal"
    assert roles(manifest)["optimizer"] > 0
    names = [item.path for item in catalog.find_checkpoints(str(tmp_path / "run")) if item.certain]
    assert [name for name in names if name != "out.bin"] == ["global_step2"]


def test_one_parameter_by_itself_is_incomplete(tmp_path: Path) -> None:
    write_universal(tmp_path / "run", stage=1)
    path = tmp_path / "run" / "global_step2" / "zero" / "a.bias" / "fp32.pt"
    with pytest.raises(IncompleteCheckpointError, match="a folder for each parameter"):
        ptbin.convert(str(path), str(tmp_path / "x.bin"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tag: (tag / "zero" / "a.bias" / "fp32.pt").unlink(), "zero/a.bias/fp32.pt is missing"),
        (
            lambda tag: torch.save(torch.tensor(9.0), tag / "zero" / "a.bias" / "step.pt"),
            "says optimizer step 7|says optimizer step 9",
        ),
        (
            lambda tag: (tag / "mp_rank_00_model_states.pt").unlink(),
            r"mp_rank_00_model_states\.pt is missing",
        ),
    ],
)
def test_a_universal_checkpoint_that_is_not_whole_is_refused(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    write_universal(tmp_path / "run", stage=1)
    change(tmp_path / "run" / "global_step2")
    with pytest.raises(IncompleteCheckpointError, match=message):
        converted(tmp_path / "run" / "global_step2")
