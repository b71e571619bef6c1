"""Megatron-LM's checkpoints of small models: whole, cut into the files of its ranks, and as `torch_dist`.

The layout is that of megatron/training/checkpointing.py and megatron-core 0.16. megatron-core itself is no
dependency of the suite; `docs/parts.md` says what its own files were held against.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.distributed import save_alone

__all__ = [
    "Grid",
    "Model",
    "arguments_of",
    "dist_entries",
    "made_by_megatron",
    "whole",
    "write_dist",
    "write_ranks",
]

ITERATION = 7


@dataclass(frozen=True)
class Model:
    """Of which the weights are random. `experts` of kind `local`, `grouped` or `fused` (`GroupedMLP`)."""

    layers: int = 2
    width: int = 16
    heads: int = 8
    groups: int = 4
    hidden: int = 24
    vocabulary: int = 10
    gated: bool = True
    bias: bool = False
    tied: bool = False
    experts: int = 0
    kind: str = "local"


@dataclass(frozen=True)
class Grid:
    """Ranks of each kind, and the layers of each virtual chunk of each stage, in the model's order."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    expert_tensor: int = 0
    counts: tuple[int, ...] = field(default=())

    @property
    def pieces(self) -> int:
        """Ranks that one expert is cut over."""
        return self.expert_tensor or self.tensor


def whole(model: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """What one rank with all of the model would save, without padding."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    head = model.width // model.heads
    qkv, fc1 = (model.heads + 2 * model.groups) * head, model.hidden * (2 if model.gated else 1)
    found = {"embedding.word_embeddings.weight": numbers(model.vocabulary, model.width)}
    for layer in range(model.layers):
        above = f"decoder.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (model.width,),
            "self_attention.linear_proj.weight": (model.width, model.width),
            "self_attention.linear_proj.bias": (model.width,),
            "self_attention.linear_qkv.weight": (qkv, model.width),
            "self_attention.linear_qkv.bias": (qkv,),
            "pre_mlp_layernorm.weight": (model.width,),
        }
        if not model.experts:
            shapes |= {
                "mlp.linear_fc1.weight": (fc1, model.width),
                "mlp.linear_fc1.bias": (fc1,),
                "mlp.linear_fc2.weight": (model.width, model.hidden),
                "mlp.linear_fc2.bias": (model.width,),
            }
        else:
            shapes |= {"mlp.router.weight": (model.experts, model.width), **_expert_shapes(model, fc1)}
        found |= {
            above + name: numbers(*shape)
            for name, shape in shapes.items()
            if model.bias or not name.endswith("bias")
        }
    found["decoder.final_layernorm.weight"] = numbers(model.width)
    if not model.tied:
        found["output_layer.weight"] = numbers(model.vocabulary, model.width)
    return found


def _expert_shapes(model: Model, fc1: int) -> dict[str, tuple[int, ...]]:
    sizes = {"linear_fc1": (fc1, model.width), "linear_fc2": (model.width, model.hidden)}
    everyone = range(model.experts)
    if model.kind == "fused":
        return {
            "mlp.experts.weight1": (model.width, model.experts * fc1),
            "mlp.experts.weight2": (model.experts * model.hidden, model.width),
        }
    if model.kind == "grouped":
        return {f"mlp.experts.{name}.weight{e}": shape for name, shape in sizes.items() for e in everyone}
    return {
        f"mlp.experts.local_experts.{e}.{name}.weight": shape
        for e in everyone
        for name, shape in sizes.items()
    }


def arguments_of(model: Model, grid: Grid, **more: Any) -> argparse.Namespace:
    """`args`, of which a real one has six hundred."""
    return argparse.Namespace(
        num_layers=model.layers,
        hidden_size=model.width,
        num_attention_heads=model.heads,
        num_query_groups=model.groups,
        group_query_attention=True,
        kv_channels=model.width // model.heads,
        swiglu=model.gated,
        num_experts=model.experts or None,
        vocab_size=model.vocabulary,
        untie_embeddings_and_output_weights=not model.tied,
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipeline,
        virtual_pipeline_model_parallel_size=grid.virtual if grid.virtual > 1 else None,
        expert_model_parallel_size=grid.expert,
        expert_tensor_parallel_size=grid.pieces,
        params_dtype=torch.bfloat16,
        **more,
    )


def write_ranks(
    folder: Path,
    model: Model,
    tensors: dict[str, torch.Tensor],
    grid: Grid,
    *,
    file: str = "model_optim_rng.pt",
    **arguments: Any,
) -> Path:
    """The files of all ranks that save."""
    args = arguments_of(model, grid, **arguments)
    for number, stage in itertools.product(
        range(max(grid.expert * grid.pieces, grid.tensor)), range(grid.pipeline)
    ):
        tensor_rank, expert_rank = number % grid.tensor, number // grid.pieces % grid.expert
        name = f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if grid.pipeline > 1 else "")
        path = folder / (name + (f"_{expert_rank:03d}" if grid.expert > 1 else "")) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        chunks = [
            dict(_chunk(model, tensors, grid, virtual, stage, tensor_rank, expert_rank))
            for virtual in range(grid.virtual)
        ]
        models = {"model": chunks[0]} if grid.virtual == 1 else {f"model{i}": c for i, c in enumerate(chunks)}
        beside = {
            "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}},
            "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
        }
        torch.save(
            {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION, **models, **beside}, path
        )
    return folder


def _chunk(
    model: Model,
    tensors: dict[str, torch.Tensor],
    grid: Grid,
    virtual: int,
    stage: int,
    tensor_rank: int,
    expert_rank: int,
) -> Iterator[tuple[str, Any]]:
    """What one chunk of one rank is saved as; its layers and experts count from 0."""
    counts = grid.counts or (model.layers // (grid.pipeline * grid.virtual),) * grid.pipeline * grid.virtual
    assert sum(counts) == model.layers
    place = virtual * grid.pipeline + stage
    first = sum(counts[:place])
    is_last = place == len(counts) - 1
    if model.tied and is_last and len(counts) > 1:
        tensors = {**tensors, "output_layer.weight": tensors["embedding.word_embeddings.weight"]}
    for name, tensor in tensors.items():
        steps = name.split(".")
        if steps[0] == "decoder" and steps[1] == "layers":
            if not 0 <= int(steps[2]) - first < counts[place]:
                continue
            steps[2] = str(int(steps[2]) - first)
        elif not (place == 0 if steps[0] == "embedding" else is_last):
            continue
        count = model.experts // grid.expert
        if "local_experts" in steps:
            at = steps.index("local_experts") + 1
            if int(steps[at]) // count != expert_rank:
                continue
            steps[at] = str(int(steps[at]) % count)
        elif "experts" in steps and model.kind == "grouped":
            number = int(steps[-1].removeprefix("weight"))
            if number // count != expert_rank:
                continue
            steps[-1] = f"weight{number % count}"
        rank, ranks = (
            (tensor_rank % grid.pieces, grid.pieces) if "experts" in steps else (tensor_rank, grid.tensor)
        )
        if name.endswith((".experts.weight1", ".experts.weight2")):
            yield ".".join(steps), _fused_piece(model, name, tensor, expert_rank, grid.expert, rank, ranks)
        else:
            yield ".".join(steps), _piece(model, name, tensor, rank, ranks).clone()
        if name.endswith("linear_proj.weight"):
            yield ".".join(steps[:-1]) + "._extra_state", torch.full((rank,), 1, dtype=torch.uint8)


def _piece(model: Model, name: str, tensor: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    if "word_embeddings" in name or name.startswith("output_layer"):
        rows = -len(tensor) % (4 * count)  # Megatron pads for the ranks that a run has
        return torch.cat([tensor, torch.full((rows, tensor.shape[1]), 9.0).bfloat16()]).chunk(count)[rank]
    if "linear_fc1" in name and model.gated:
        return torch.cat([half.chunk(count)[rank] for half in tensor.chunk(2)])
    if "linear_fc1" in name or "linear_qkv." in name:
        return tensor.chunk(count)[rank]
    if "linear_proj.weight" in name or "linear_fc2.weight" in name:
        return tensor.chunk(count, 1)[rank]
    return tensor


def _fused_piece(
    model: Model, name: str, tensor: torch.Tensor, expert: int, experts: int, rank: int, ranks: int
) -> torch.Tensor:
    """`GroupedMLP` lies as [experts, ...] whatever its shape."""
    if name.endswith("2"):
        mine = tensor.view(model.experts, -1, model.width).chunk(experts)[expert].chunk(ranks, 1)[rank]
        return mine.reshape(-1, model.width).clone()
    own = tensor.view(model.experts, model.width, -1).chunk(experts)[expert]
    blocks = own.chunk(2, 2) if model.gated else (own,)
    cut = torch.cat([block.chunk(ranks, 2)[rank] for block in blocks], 2)
    return cut.reshape(model.width, -1).clone()


# -- torch_dist ----------------------------------------------------------------------------------------------

_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def dist_entries(
    model: Model, tensors: dict[str, torch.Tensor], *, stacked: bool = True
) -> dict[str, torch.Tensor]:
    """The names of `sharded_state_dict`: experts on an axis, and layers too where they are stacked."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        below = name.split(".", 3)[-1]
        new = (
            name.replace(below, _FUSED_NORMS.get(below, below))
            if name.startswith("decoder.layers.")
            else name
        )
        found[new.replace("local_experts", "experts")] = tensor
    if model.experts:
        found = _stack(found, ".experts.experts.", model.experts)
    return _stack(found, "decoder.layers.", model.layers) if stacked else found


def _stack(tensors: dict[str, torch.Tensor], above: str, count: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        before, mark, rest = name.partition(above)
        number, _, below = rest.partition(".")
        if not mark:
            found[name] = tensor
        elif number == "0":
            found[before + mark + below] = torch.stack(
                [tensors[f"{before}{mark}{n}.{below}"] for n in range(count)]
            )
    return found


def write_dist(
    folder: Path, model: Model, entries: dict[str, torch.Tensor], *, prefix: str = "", arguments: bool = True
) -> Path:
    """A `torch_dist` folder with the optimizer, as torch's own writer saves those names."""
    named: dict[str, Any] = {prefix + name: tensor for name, tensor in entries.items()}
    for name, tensor in entries.items():
        named[f"optimizer.state.exp_avg.{prefix}{name}"] = torch.zeros(tensor.shape)
        named[f"chained_1.optimizer.state.fp32_param.{prefix}{name}"] = tensor.float()
    where = prefix + "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2"
    named |= {where: torch.ones(5, dtype=torch.uint8), "rng_state/shard_0.0_1.1": [torch.get_rng_state()]}
    save_alone(folder, named)
    common: dict[str, Any] = {"iteration": ITERATION, "optimizer": {"param_groups": [{"lr": 0.1}]}}
    if arguments:
        common["args"] = arguments_of(model, Grid())
    torch.save(common, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    (folder / "metadata.json").write_text(json.dumps(backends))
    return folder


def made_by_megatron(folder: Path) -> None:
    """Let `.metadata` be of the class that megatron-core 0.15 gives it."""
    from torch.distributed.checkpoint.metadata import Metadata

    where = "megatron.core.dist_checkpointing.strategies.torch"
    cls = type("MCoreMetadata", (Metadata,), {"__module__": where})
    module = types.ModuleType(where)
    module.__dict__["MCoreMetadata"] = cls
    with (folder / ".metadata").open("rb") as file:
        known = pickle.load(file)
    found: Any = object.__new__(cls)
    found.__dict__.update(known.__dict__, mcore_data={})
    parents = [".".join(where.split(".")[:n]) for n in range(1, 5)]
    sys.modules.update({name: types.ModuleType(name) for name in parents} | {where: module})
    try:
        (folder / ".metadata").write_bytes(pickle.dumps(found))
    finally:
        for name in (*parents, where):
            del sys.modules[name]
