"""Tensor-parallel slices and pipelines laid out by hand as DeepSpeed's producers write them.

`write_ranks` cuts a model by every rule that `universal_checkpoint_info` has (deepspeed/checkpoint/
ds_to_universal.py, `merge_tp_slices`; module_inject/layers.py, 0.19). `write_layers` gives GPT-NeoX's and
Bloom's names and cuts (tools/ckpts/convert_neox_to_hf.py; transformers'
convert_bloom_original_checkpoint_to_pytorch.py) to a model of transformers. Imports nothing of ptbin.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.deepspeed_zero import by_hand

__all__ = [
    "bloom_layers",
    "cut",
    "info",
    "neox_layers",
    "rank_model",
    "write_layers",
    "write_ranks",
    "write_universal",
    "write_zero_ranks",
]

VOCABULARY = 10
PADDED = 12


def rank_model(seed: int = 0) -> dict[str, torch.Tensor]:
    """The whole of what `write_ranks` cuts; sizes that 2, 3 and 4 divide."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (VOCABULARY, 5),
        "up.weight": (12, 5),
        "up.bias": (12,),
        "down.weight": (5, 12),
        "norm.weight": (5,),
        "qkv.weight": (36, 5),
        "old_qkv.weight": (36, 5),
        "gate_up.weight": (24, 5),
        "grouped.weight": (20, 5),
    }
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def _map(shape: tuple[int, ...], pieces: list[list[tuple[int, int]]]) -> dict[str, Any]:
    """An affine map over rows: of each rank the (first row, rows) it holds, as DeepSpeed writes it."""
    columns = shape[1] if len(shape) > 1 else 1
    strides = [columns, 1][: len(shape)]
    ranks = {}
    for rank, own in enumerate(pieces):
        rows, found = 0, []
        for first, count in own:
            holders = [r for r, other in enumerate(pieces) if (first, count) in other]
            extent = [count, *shape[1:]]
            found.append(
                {
                    "shape": extent,
                    "source": [first * columns, strides],
                    "dest": [rows * columns, strides],
                    "locations": holders,
                }
            )
            rows += count
        ranks[rank] = {"shard_shape": [rows, *shape[1:]], "pieces": found}
    return {"logical_shape": list(shape), "ranks": ranks}


def _grouped(ranks: int) -> list[list[tuple[int, int]]]:
    """Twelve rows of queries cut over the ranks, eight of keys and values on all."""
    share = 12 // ranks
    return [[(rank * share, share), (12, 8)] for rank in range(ranks)]


def info(ranks: int) -> dict[str, Any]:
    """`universal_checkpoint_info` of `rank_model` on so many ranks."""
    widths = [[12 // ranks] * ranks] * 3
    return {
        "universal_checkpoint_version": 0.4,
        "parameter_with_row_parallelism_patterns": [r"^down\.weight$"],
        "tp_replicated_parameter_patterns": [r".*norm\.weight"],
        "vocabulary_parameter_patterns": [r"embed\.\w+"],
        "original_vocab_size": VOCABULARY,
        "parameter_with_2_sub_params_cat_dim_0": [r"^gate_up\.weight$"],
        "parameter_with_sub_params": [
            {"patterns": [r"^qkv\.weight$"], "shape": [(12, 12, 12), 5], "partition_dim": 0},
        ],
        "sub_param_shard_widths": {r"^qkv\.weight$": widths},
        "affine_map": {
            "version": 1,
            "params": {
                r"^grouped\.weight$": _map((20, 5), _grouped(ranks)),
                r"^old_qkv\.weight$": _map(
                    (36, 5),
                    [[(12 * s + r * (12 // ranks), 12 // ranks) for s in range(3)] for r in range(ranks)],
                ),
            },
        },
    }


def cut(whole: Mapping[str, torch.Tensor], ranks: int) -> list[dict[str, torch.Tensor]]:
    """What each rank holds."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in whole.items():
        if name == "embed.weight":
            padded = torch.full((PADDED, 5), -1.0, dtype=tensor.dtype)
            padded[:VOCABULARY] = tensor
            pieces = padded.chunk(ranks)
        elif name in ("qkv.weight", "old_qkv.weight"):
            pieces = tuple(
                torch.cat(parts) for parts in zip(*(t.chunk(ranks) for t in tensor.chunk(3)), strict=True)
            )
        elif name == "gate_up.weight":
            pieces = tuple(
                torch.cat(parts) for parts in zip(*(t.chunk(ranks) for t in tensor.chunk(2)), strict=True)
            )
        elif name == "grouped.weight":
            pieces = tuple(torch.cat([tensor[a : a + n] for a, n in own]) for own in _grouped(ranks))
        elif name == "norm.weight":
            pieces = (tensor,) * ranks
        else:
            pieces = tensor.chunk(ranks, 1 if name == "down.weight" else 0)
        for rank, piece in enumerate(pieces):
            found[rank][name] = piece.clone()
    return found


Change = Callable[[int, dict[str, Any]], None]


def write_ranks(folder: Path, ranks: int, change: Change | None = None) -> dict[str, torch.Tensor]:
    """`mp_rank_<n>_model_states.pt` as AutoTP writes them without ZeRO; the model."""
    folder.mkdir(parents=True)
    whole = rank_model()
    for rank, module in enumerate(cut(whole, ranks)):
        states = {
            "module": {**module, "steps": torch.tensor(7)},
            "buffer_names": ["steps"],
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(40)}}, "param_groups": [{"params": [0]}]},
            "global_steps": 7,
            "mp_world_size": ranks,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": ranks},
            "ds_version": "0.19.8",
            "universal_checkpoint_info": info(ranks),
        }
        if change is not None:
            change(rank, states)
        torch.save(states, folder / f"mp_rank_{rank:02d}_model_states.pt")
    return {**whole, "steps": torch.tensor(7)}


def write_zero_ranks(folder: Path, ranks: int, *, stage: int, world_size: int) -> dict[str, torch.Tensor]:
    """The same under ZeRO, each tensor-parallel rank's masters in flat partitions; the masters."""
    whole = rank_model()
    folder.mkdir(parents=True)
    for rank, module in enumerate(cut(whole, ranks)):

        def told(name: str, states: dict[str, Any]) -> None:
            if "module" in states:
                states["checkpoint_parallel_dimensions"] = {"pp_degree": 1, "tp_degree": ranks}
                states["universal_checkpoint_info"] = info(ranks)

        names = list(module)
        groups = [{n: module[n] for n in names[:4]}, {n: module[n] for n in names[4:]}]
        tag = by_hand(folder / f"of_{rank}", groups, stage=stage, world_size=world_size, change=told)
        for path in tag.iterdir():
            shutil.move(path, folder / path.name.replace("mp_rank_00", f"mp_rank_{rank:02d}"))
        shutil.rmtree(folder / f"of_{rank}")
    return whole


def write_universal(folder: Path, *, stage: int, step: int = 7) -> dict[str, torch.Tensor]:
    """A universal checkpoint: flat tensors where it was made from stage 3; the masters."""
    g = torch.Generator().manual_seed(3)
    whole = {"a.weight": torch.randn(4, 3, generator=g), "a.bias": torch.randn(4, generator=g)}
    tag = by_hand(
        folder,
        [whole],
        stage=stage,
        world_size=2,
        buffers={"count": torch.tensor(5)},
        shared={"tied": "a.weight"},
    )
    for path in tag.glob("*_optim_states.pt"):
        path.unlink()
    for name, tensor in whole.items():
        own = tag / "zero" / name
        own.mkdir(parents=True)
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            value = tensor if state == "fp32" else torch.zeros_like(tensor)
            torch.save(
                {"param": value, "cat_dim": 0} if stage < 3 else value.reshape(-1), own / f"{state}.pt"
            )
        if stage < 3:
            torch.save(torch.tensor(float(step)), own / "step.pt")
    torch.save({"param_groups": []}, tag / "zero" / "optimizer_state.pt")
    return {**whole, "tied": whole["a.weight"], "count": torch.tensor(5)}


_COLUMNS = re.compile(r"(attention\.dense|dense_4h_to_h)\.weight")
_ROWS = re.compile(r"word_embeddings\.weight|final_linear|query_key_value|dense_h_to_4h")
_BIASES = re.compile(r"(attention\.dense|dense_4h_to_h)\.bias")


def neox_layers(state: Mapping[str, torch.Tensor], count: int) -> dict[int, dict[str, torch.Tensor]]:
    """A `GPTNeoXForCausalLM` in GPT-NeoX's layers."""
    layers: dict[int, dict[str, torch.Tensor]] = {}
    names = {
        "gpt_neox.embed_in.weight": (0, "word_embeddings.weight"),
        "gpt_neox.final_layer_norm.weight": (count + 3, "norm.weight"),
        "gpt_neox.final_layer_norm.bias": (count + 3, "norm.bias"),
        "embed_out.weight": (count + 4, "final_linear.weight"),
        "lm_head.weight": (count + 4, "final_linear.weight"),
    }
    for name, tensor in state.items():
        block = re.match(r"gpt_neox\.layers\.(\d+)\.(.+)", name)
        layer, own = (int(block[1]) + 2, block[2]) if block else names[name]
        layers.setdefault(layer, {})[own] = tensor
    return layers


def bloom_layers(state: Mapping[str, torch.Tensor], count: int) -> dict[int, dict[str, torch.Tensor]]:
    """A `BloomModel` in Megatron-DeepSpeed's layers."""
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        block = re.match(r"h\.(\d+)\.(.+)", name)
        if block:
            layers.setdefault(int(block[1]) + 3, {})[block[2]] = tensor
        elif name.startswith("ln_f."):
            layers.setdefault(count + 4, {})[name.removeprefix("ln_f.")] = tensor
        else:
            own = name.replace("word_embeddings_layernorm", "word_embeddings.norm")
            layers.setdefault(1, {})[own] = tensor
    return layers


def write_layers(
    folder: Path,
    layers: Mapping[int, Mapping[str, torch.Tensor]],
    ranks: int,
    *,
    count: int | None = None,
    summed: bool = False,
    optimizer: Mapping[str, Any] | None = None,
) -> None:
    """Layer files of so many tensor-parallel ranks. `summed`: biases of row-parallel layers are summands.

    `count` blocks are what the training arguments say; `optimizer` is what the model states keep of it.
    """
    folder.mkdir(parents=True)
    for layer, state in layers.items():
        for rank in range(ranks):
            own = {}
            for name, tensor in state.items():
                if _COLUMNS.search(name):
                    own[name] = tensor.chunk(ranks, 1)[rank].clone()
                elif _ROWS.search(name):
                    own[name] = tensor.chunk(ranks)[rank].clone()
                elif _BIASES.search(name) and summed:
                    own[name] = tensor / ranks
                else:
                    own[name] = tensor.clone()
            torch.save(own, folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
    for rank in range(ranks):
        states = {
            "module": None,
            "args": argparse.Namespace(lr=0.1, **({"num_layers": count} if count else {})),
            "global_steps": 3,
            "optimizer": optimizer,
        }
        torch.save({**states, "mp_world_size": ranks}, folder / f"mp_rank_{rank:02d}_model_states.pt")
        torch.save(
            {"optimizer_state_dict": {}}, folder / f"zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt"
        )
