"""DeepSpeed ZeRO folders: real ones by DeepSpeed on gloo, and ones laid out by hand after its source.

    made = train(tmp_path, {2: ["stage1"]})       # {2: {"stage1": tmp_path/"2/stage1/global_step2"}}

`train` makes ranks of this file, and each makes every variant in turn. What a folder means is asked of
DeepSpeed itself, by the `zero_to_fp32` that it puts beside checkpoints (`consolidated`).
`by_hand` writes what `deepspeed/runtime/zero/stage_1_and_2.py` and `stage3.py` (`state_dict`) and
`runtime/engine.py` (`_save_checkpoint`) write, 0.19, for cases that no short training brings about.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.checkpoints.ranks import run_ranks

__all__ = ["VARIANTS", "by_hand", "consolidate", "consolidated", "run_rank", "train"]

TAG = "global_step2"
IMPORTS = (
    "deepspeed",
    "deepspeed.utils.zero_to_fp32",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
)
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1", "DS_BUILD_OPS": "0"}
"""DeepSpeed runs on the CPU and compiles nothing."""

VARIANTS: dict[str, dict[str, Any]] = {
    "stage1": {"zero_optimization": {"stage": 1}},
    "stage2": {"zero_optimization": {"stage": 2}},
    "stage2_round_robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "stage3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "stage3_subgroups": {
        "zero_optimization": {"stage": 3, "sub_group_size": 40, "stage3_param_persistence_threshold": 10}
    },
    "stage2_bfloat16_buffers": {"zero_optimization": {"stage": 2}, "_buffers": "bfloat16"},
    "stage2_fp32": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}},
    "stage3_fp32": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": False}},
}
"""Name to what its DeepSpeed configuration adds to bfloat16 training; `_buffers` is the buffers' type."""


class Net(nn.Module):
    """Ties, frozen weights, buffers of several types; sizes that neither 2 nor 3 divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.frozen = nn.Linear(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.body = nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.tensor([1.5, 0.5, 2.5]))
        self.bare = nn.Parameter(torch.tensor([0.75]))
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(9).reshape(3, 3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("slope", torch.linspace(0, 1, 5))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        for parameter in self.frozen.parameters():
            parameter.requires_grad = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embedding(tokens))
        # Not by its own forward, which wants statistics and inputs of one type: ZeRO 3 gives it two.
        hidden = hidden * self.norm.weight + self.norm.bias
        mean, count = self.norm.running_mean, self.norm.num_batches_tracked
        assert mean is not None
        assert count is not None
        mean += hidden.detach().mean(0).to(mean)
        count += 1
        hidden = self.body(hidden * self.slope.to(hidden)) * self.scale.sum() + self.bare
        logits: torch.Tensor = self.head(hidden)
        return logits


Groups = Sequence[Mapping[str, torch.Tensor]]
Change = Callable[[str, dict[str, Any]], None]


def by_hand(
    folder: Path,
    groups: Groups,
    *,
    stage: int,
    world_size: int,
    frozen: Mapping[str, torch.Tensor] | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
    shared: Mapping[str, str] | None = None,
    paddings: Sequence[Sequence[int]] | None = None,
    change: Change | None = None,
    legacy: bool = False,
) -> Path:
    """The tag folder that the published layout gives these parameters.

    Args:
        paddings: for each group (stage 2) the elements behind each parameter.
        change: called with each file's name and its content, before it is written.
        legacy: in torch's format of before 1.6.
    """
    frozen, buffers, shared = frozen or {}, buffers or {}, shared or {}
    tag = folder / TAG
    tag.mkdir(parents=True)

    def save(name: str, states: dict[str, Any]) -> None:
        if change is not None:
            change(name, states)
        torch.save(states, tag / name, _use_new_zipfile_serialization=not legacy)

    cut = _cut_stage_3 if stage == 3 else _cut_stage_2
    rows = [list(row) for row in paddings] if paddings is not None else None
    partitions = [cut(group, world_size, rows[i] if rows else None) for i, group in enumerate(groups)]
    for rank in range(world_size):
        flats = [partition[rank] for partition in partitions]
        states: dict[str, Any] = {
            "zero_stage": stage,
            "partition_count": world_size if stage == 3 else [world_size] * len(groups),
            "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups": flats,
            "optimizer_state_dict" if stage == 3 else "base_optimizer_state": {
                "state": {i: {"exp_avg": torch.zeros_like(flat)} for i, flat in enumerate(flats)},
                "param_groups": [{"params": [i]} for i in range(len(flats))],
            },
        }
        if paddings is not None:
            states["param_alignment_paddings"] = rows
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        save(name, {"optimizer_state_dict": states, "ds_version": "0.19.8"})
    trained = {name: tensor for group in groups for name, tensor in group.items()}
    for rank in range(world_size if stage == 3 else 1):
        module: dict[str, torch.Tensor] = {**buffers}
        for name, tensor in {**trained, **frozen}.items():
            module[name] = torch.empty(0) if stage == 3 else tensor.bfloat16()
        module.update({name: module[owner] for name, owner in shared.items() if owner in module})
        fragments = dict(frozen)
        if stage == 3:
            fragments = {name: _share(tensor, world_size, rank) for name, tensor in frozen.items()}
        states = {
            "module": module,
            "buffer_names": list(buffers),
            "param_shapes": [{name: tensor.shape for name, tensor in group.items()} for group in groups],
            "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()},
            "frozen_param_fragments": fragments,
            "shared_params": dict(shared),
            "global_steps": 7,
            "ds_version": "0.19.8",
        }
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        save(f"{prefix}mp_rank_00_model_states.pt", states)
    return tag


def _cut_stage_2(
    group: Mapping[str, torch.Tensor], world_size: int, padding: Sequence[int] | None
) -> list[torch.Tensor]:
    """One vector, padded to a multiple of twice the ranks and cut evenly; padding at the end is not saved."""
    behind = padding or [0] * len(group)
    parts = [
        part for t, n in zip(group.values(), behind, strict=True) for part in (t.reshape(-1), _ones(n, t))
    ]
    vector = torch.cat(parts)
    share = -(-vector.numel() // (2 * world_size)) * 2
    cuts = []
    for rank in range(world_size):
        piece = torch.full((share,), 7.5, dtype=vector.dtype)
        held = vector[rank * share : (rank + 1) * share]
        piece[: held.numel()] = held
        cuts.append(piece[: held.numel()])
    return cuts


def _cut_stage_3(
    group: Mapping[str, torch.Tensor], world_size: int, _padding: Sequence[int] | None
) -> list[torch.Tensor]:
    return [torch.cat([_share(t, world_size, rank) for t in group.values()]) for rank in range(world_size)]


def _share(tensor: torch.Tensor, world_size: int, rank: int) -> torch.Tensor:
    """What one rank of stage 3 holds: an equal part, the last padded (`zero3_partitioned_param_info`)."""
    share = -(-tensor.numel() // world_size)
    flat = torch.cat([tensor.reshape(-1), _ones(share * world_size - tensor.numel(), tensor)])
    return flat[rank * share : (rank + 1) * share].clone()


def _ones(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.ones(count, dtype=like.dtype)


def train(folder: Path, worlds: Mapping[int, Sequence[str]]) -> dict[int, dict[str, Path]]:
    """Two optimizer steps of each variant, by number of processes; their tag folders in the same order."""
    starts = [(world, [str(folder / str(world)), *variants]) for world, variants in worlds.items()]
    run_ranks(Path(__file__), starts, imports=IMPORTS, environment=ENVIRONMENT)
    return {
        world: {name: folder / str(world) / name / TAG for name in variants}
        for world, variants in worlds.items()
    }


def consolidate(*tag_folders: Path) -> None:
    """Have DeepSpeed's own `zero_to_fp32` say what tag folders mean; `consolidated` gives its answer.

    In a process of its own, since importing DeepSpeed changes the process that does. `train` has done it.
    """
    words = ["consolidate", *map(str, tag_folders)]
    run_ranks(Path(__file__), [(1, words)], imports=IMPORTS[1:2], environment=ENVIRONMENT)


def consolidated(tag_folder: Path) -> dict[str, torch.Tensor]:
    """The state dict that `zero_to_fp32` made of a tag folder."""
    found: dict[str, torch.Tensor] = torch.load(tag_folder.parent / "fp32.pt", weights_only=True)
    return found


def _consolidate(tag_folders: Sequence[Path]) -> None:
    zero_to_fp32 = importlib.import_module("deepspeed.utils.zero_to_fp32")
    for tag in tag_folders:
        found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(tag.parent), tag=tag.name)
        torch.save(found, tag.parent / "fp32.pt")


def run_rank(rank: int, world: int, words: str, *names: str) -> None:
    if words == "consolidate":
        _consolidate([Path(name) for name in names])
        return
    folder = Path(words)
    folder.mkdir(parents=True, exist_ok=True)
    # By name: DeepSpeed is not typed, and need not be installed.
    deepspeed = importlib.import_module("deepspeed")
    # Otherwise it compiles C++ for collectives in shared memory. (`deepspeed.comm.torch` is torch itself.)
    vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    deepspeed.init_distributed(dist_backend="gloo")
    for name in names:
        _train_one(deepspeed, folder / name, VARIANTS[name])
    torch.distributed.barrier()
    if rank == 0:
        _consolidate([folder / name / TAG for name in names])
    torch.distributed.destroy_process_group()


def _train_one(deepspeed: Any, folder: Path, extra: Mapping[str, Any]) -> None:
    torch.manual_seed(3)
    model = Net()
    settings = dict(extra)
    buffers = settings.pop("_buffers", None)
    if buffers is not None:
        for name, buffer in model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            if buffer.is_floating_point():
                setattr(model.get_submodule(owner), leaf, buffer.to(getattr(torch, buffers)))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for n, p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=0.013,
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **settings,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    torch.manual_seed(torch.distributed.get_rank())
    for _ in range(2):
        tokens = torch.randint(0, 11, (6,))
        loss = engine(tokens).float().square().mean()
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder), tag=TAG, client_state={"epoch": 4})
