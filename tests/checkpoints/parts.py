"""Files that are one part of a checkpoint, and folders of them, as producers name and fill them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoints.registry import Checkpoint, checkpoint

__all__ = ["FOLDERS", "expert", "weights", "write", "write_experts"]

REASON = "incomplete_checkpoint"


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """What one rank holds."""
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(3, 4, generator=generator), "b.bias": torch.randn(5, generator=generator)}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)


def _saved(path: Path, content: Any) -> Checkpoint:
    write(path, content)
    return Checkpoint(path, reason=REASON)


def _args(**sizes: int) -> argparse.Namespace:
    return argparse.Namespace(lr=0.1, **sizes)


# -- what a single file says of itself -------------------------------------------------------------------


@checkpoint(reason=REASON)
def megatron_tensor_parallel(path: Path) -> Checkpoint:
    model = {"language_model": {"encoder": weights()}}
    return _saved(path, {"args": _args(tensor_model_parallel_size=2), "model": model, "iteration": 7})


@checkpoint(reason=REASON)
def megatron_pipeline_parallel(path: Path) -> Checkpoint:
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 4}
    return _saved(path, {"args": _args(**sizes), "model": weights()})


@checkpoint(reason=REASON)
def megatron_arguments_as_a_dict(path: Path) -> Checkpoint:
    return _saved(path, {"args": {"expert_model_parallel_size": 8}, "model": weights()})


@checkpoint(reason=REASON, suffix=".ckpt")
def nemo_tensor_parallel(path: Path) -> Checkpoint:
    config = {"cfg": {"tensor_model_parallel_size": 2, "precision": "bf16"}}
    return _saved(path, {"state_dict": weights(), "hyper_parameters": config})


@checkpoint(reason=REASON)
def fairseq_model_parallel(path: Path) -> Checkpoint:
    return _saved(path, {"model": weights(), "cfg": {"common": {"model_parallel_size": 8}}})


@checkpoint(reason=REASON)
def fairscale_shard(path: Path) -> Checkpoint:
    return _saved(path, {"model": weights(), "shard_metadata": {"param_metadata": []}})


@checkpoint(reason=REASON)
def deepspeed_tensor_parallel(path: Path) -> Checkpoint:
    return _saved(path, {"module": weights(), "mp_world_size": 2, "dp_world_size": 1, "ds_version": "0.19"})


@checkpoint(reason=REASON)
def deepspeed_universal(path: Path) -> Checkpoint:
    return _saved(path, {"module": weights(), "universal_checkpoint_info": {"original_vocab_size": 9}})


@checkpoint(reason=REASON)
def deepspeed_experts_elsewhere(path: Path) -> Checkpoint:
    return _saved(path, {"module": weights(), "mp_world_size": 1, "num_experts": [4], "ds_version": "0.19"})


@checkpoint(reason=REASON)
def deepspeed_zero_3_model_states(path: Path) -> Checkpoint:
    module = {name: torch.empty(0) for name in weights()} | {"running_mean": torch.ones(3)}
    shapes = [{name: tensor.shape for name, tensor in weights().items()}]
    return _saved(path, {"module": module, "param_shapes": shapes, "mp_world_size": 1})


@checkpoint(reason=REASON, suffix=".safetensors")
def dcp_sharding_info(path: Path) -> Checkpoint:
    told = {"a.weight": {"saved_offsets": [3, 0]}, "b.bias": {"saved_offsets": [0]}}
    save_file(weights(), path, {"DCP_SHARDING_INFO": json.dumps(told), "DCP_VERSION": "1.0", "format": "pt"})
    return Checkpoint(path, reason=REASON)


# -- what says so of a whole file and is no evidence ------------------------------------------------------


@checkpoint(torch_reads="pickle")
def megatron_alone(path: Path) -> Checkpoint:
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "world_size": 8}
    torch.save({"args": _args(**sizes), "model": weights()}, path)
    return Checkpoint(path, weights())


@checkpoint()
def deepspeed_alone(path: Path) -> Checkpoint:
    state = {
        "module": weights(),
        "mp_world_size": 1,
        "dp_world_size": 8,
        "num_experts": [],
        "ds_version": "0.19",
    }
    torch.save({**state, "universal_checkpoint_info": {"original_vocab_size": 9}}, path)
    return Checkpoint(path, weights())


@checkpoint()
def experts_of_ones_own(path: Path) -> Checkpoint:
    torch.save({"module": weights(), "num_experts": [8]}, path)
    return Checkpoint(path, weights())


@checkpoint(suffix=".safetensors", torch_reads=None)
def dcp_whole(path: Path) -> Checkpoint:
    told = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in weights().items()}
    save_file(weights(), path, {"DCP_SHARDING_INFO": json.dumps(told)})
    return Checkpoint(path, weights())


# -- folders ----------------------------------------------------------------------------------------


def _write_all(**files: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for name, content in files.items():
            write(folder / name, content)

    return build


def expert(layer: int, number: int) -> dict[str, torch.Tensor]:
    """One expert of one layer, under DeepSpeed's name for it."""
    name = f"{layer}.deepspeed_moe.experts.deepspeed_experts.{number}.weight"
    return {name: torch.full((2, 3), float(10 * layer + number))}


FOLDERS: dict[str, Callable[[Path], None]] = {
    "meta": _write_all(**{f"consolidated.{n:02d}.pth": weights(n) for n in range(2)}),
    "meta, first missing": _write_all(**{"consolidated.01.pth": weights()}),
    "megatron": _write_all(
        **{f"mp_rank_{n:02d}/model_optim_rng.pt": {"model": weights(n)} for n in range(2)}
    ),
    "megatron, one rank": _write_all(**{"mp_rank_00_001/model_rng.pt": {"model": weights()}}),
    "nemo": _write_all(
        **{f"tp_rank_{n:02d}_pp_rank_000/megatron_gpt.ckpt": {"state_dict": weights(n)} for n in range(2)}
    ),
    "deepspeed pipeline": _write_all(
        **{f"layer_{n:02d}-model_00-model_states.pt": weights(n) for n in (0, 1, 3)},
        **{"mp_rank_00_model_states.pt": {"module": None, "mp_world_size": 1}},
    ),
    "deepspeed experts, no model": _write_all(
        **{f"layer_0_expert_{n}_mp_rank_00_model_states.pt": expert(0, n) for n in range(2)},
        **{"expp_rank_0_mp_rank_00_optim_states.pt": {"optimizer": {"state": {}, "param_groups": []}}},
    ),
    "deepspeed experts, tensor parallel": _write_all(
        **{f"layer_0_expert_0_mp_rank_{n:02d}_model_states.pt": expert(0, 0) for n in range(2)},
        **{f"mp_rank_{n:02d}_model_states.pt": {"module": weights(n)} for n in range(2)},
    ),
    "deepspeed tensor parallel": _write_all(
        **{f"mp_rank_{n:02d}_model_states.pt": {"module": weights(n)} for n in range(2)}
    ),
    "world size in the name": _write_all(**{"model_world_size_2_rank_0.pt": weights()}),
    "deepspeed pipeline without tensor parallel": _write_all(
        **{f"layer_{n:02d}-model_states.pt": weights(n) for n in (0, 2, 3)}
    ),
    "deepspeed stage 3 without its optimizer": _write_all(
        **{f"zero_pp_rank_{n}_mp_rank_00_model_states.pt": {"module": weights()} for n in range(2)}
    ),
    "some of the ranks": _write_all(**{f"state_rank_{n}.pt": weights(n) for n in (0, 3)}),
    "ranks": _write_all(**{f"model_final.rank_{n}.pth": weights(n) for n in range(4)}),
    "ranks of an epoch": _write_all(**{f"epoch3_rank{n}.pt": weights(n) for n in range(2)}),
    "fairseq": _write_all(**{f"checkpoint_last-shard{n}.pt": {"model": weights(n)} for n in range(2)}),
    "fairseq model parts": _write_all(
        **{f"checkpoint_last-model_part-{n}.pt": {"model": weights(n)} for n in range(2)}
    ),
    "torch shards": _write_all(
        **{f"shard-0000{n}-model-00001-of-00001.safetensors": weights(n) for n in (1, 2)}
    ),
    "shards without an index": _write_all(
        **{f"model-0000{n}-of-00002.safetensors": weights(n) for n in (1, 2)}
    ),
    "a lone shard": _write_all(**{"pytorch_model-00002-of-00003.bin": weights()}),
}
"""Folders that are one checkpoint, in parts that ptbin does not put together."""


def write_experts(folder: Path, counts: tuple[int, ...] = (2, 3)) -> dict[str, torch.Tensor]:
    """DeepSpeed's mixture of experts at ZeRO 0, whole; what the model is."""
    model = {"module": weights(), "mp_world_size": 1, "dp_world_size": 2, "ds_version": "0.19"}
    write(
        folder / "mp_rank_00_model_states.pt",
        {**model, "num_experts": list(counts), "ds_autoep_layers": None},
    )
    write(folder / "expp_rank_0_mp_rank_00_optim_states.pt", {"optimizer": {"state": {}, "param_groups": []}})
    found = weights()
    for layer, count in enumerate(counts):
        for number in range(count):
            write(folder / f"layer_{layer}_expert_{number}_mp_rank_00_model_states.pt", expert(layer, number))
            found |= expert(layer, number)
    return found
