"""Checkpoints of `torch.distributed.checkpoint`, made by real processes over gloo.

    folders = make_distributed(tmp_path)      # {"fsdp2": Path, ...}; about ten seconds

Each world size is one start of that many processes, which write all of its folders. They meet in a file, so
no port is needed. This file is also the ranks' program.

Lightning's strategy itself wants a GPU; its folder is written by the functions that its `save_checkpoint`
calls, in the same order (lightning/pytorch/strategies/fsdp.py, 2.6).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.ranks import run_ranks

__all__ = ["full_tensors", "make_distributed", "run_rank", "save_alone"]

IMPORTS = (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "lightning.fabric.strategies.fsdp",
)


def make_distributed(folder: Path) -> dict[str, Path]:
    """Every folder that takes more than one process, by name, below `folder`."""
    run_ranks(Path(__file__), [(world, [str(folder)]) for world in (2, 4)], imports=IMPORTS)
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def save_alone(path: Path, state: dict[str, Any], **arguments: Any) -> Path:
    """`dcp.save` by this process, without a process group."""
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "storage_writer" not in arguments:
            arguments["checkpoint_id"] = path
        save(state, no_dist=True, **arguments)
    return path


def full_tensors() -> dict[str, torch.Tensor]:
    """What `tensor_parallel` and `mesh` hold: the same numbers in every process."""
    generator = torch.Generator().manual_seed(7)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "rows": make(8, 3),
        "columns": make(6, 10),
        "uneven_rows": make(5, 4),
        "uneven_columns": make(3, 7, dtype=torch.bfloat16),
        "fewer_rows_than_ranks": make(3, 2),
        "middle": make(2, 9, 4, dtype=torch.float64),
        "one_row": make(1, 12),
        "replicated": make(4, 4, dtype=torch.float16),
        "half_replicated": make(6, 6),
        "both": make(7, 9),
        "both_swapped": make(5, 8, dtype=torch.bfloat16),
        "twice_the_same": make(11, 3),
        "whole_numbers": torch.arange(30).reshape(6, 5),
        "flags": make(9, 2) > 0,
    }


# -- what a rank does ----------------------------------------------------------------------------------


def _tensor_parallel(world: int) -> dict[str, Any]:
    """Sharded along one dimension of a flat mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    columns = {"columns": 1, "uneven_columns": 1, "middle": 1, "one_row": 1}
    found: dict[str, Any] = {}
    for name, tensor in full_tensors().items():
        placement = Replicate() if name == "replicated" else Shard(columns.get(name, 0))
        found[name] = distribute_tensor(tensor, mesh, [placement])
    found["plain"] = torch.full((2, 2), 3.0)
    found["scalar"] = torch.tensor(1.5)
    found["empty"] = torch.zeros(0, 3)
    return found


def _mesh() -> dict[str, Any]:
    """Sharded over a mesh of two by two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    placed: dict[str, list[Any]] = {
        "half_replicated": [Replicate(), Shard(1)],
        "replicated": [Replicate(), Replicate()],
        "both_swapped": [Shard(1), Shard(0)],
        "twice_the_same": [Shard(0), Shard(0)],
        "middle": [Shard(2), Shard(1)],
    }
    full = full_tensors()
    return {
        name: distribute_tensor(t, mesh, placed.get(name, [Shard(0), Shard(1)])) for name, t in full.items()
    }


def _network() -> torch.nn.Sequential:
    torch.manual_seed(3)
    layers = [torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3)]
    return torch.nn.Sequential(*layers)


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 5) * torch.arange(2.0)[:, None]).sum().backward()
    optimizer.step()


def _fsdp2(world: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Model, optimizer, and the optimizer flattened as torchtitan has it."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        get_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = _network(), init_device_mesh("cpu", (world,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer)
    state, moments = get_state_dict(model, optimizer)
    flat = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    return dict(state), dict(moments), dict(flat)


def _fsdp1() -> tuple[dict[str, Any], dict[str, Any]]:
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    model = FullyShardedDataParallel(_network(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.Adam(model.parameters())
    _step(model, optimizer)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        return model.state_dict(), FullyShardedDataParallel.optim_state_dict(model, optimizer)


def _fsdp_and_tensor_parallel() -> dict[str, Any]:
    """FSDP2 over tensor parallel: the first dimension cut twice, the inner cut first."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 8))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return dict(get_model_state_dict(model))


class _App:
    """A Stateful, as the tutorial's."""

    def __init__(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        self._state = {"model": model, "optim": optimizer}

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def run_rank(rank: int, world: int, words: str) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import async_save, save

    folder = Path(words)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    if world == 4:
        save({"model": _mesh()}, checkpoint_id=folder / "mesh")
        save({"model": _tensor_parallel(world)}, checkpoint_id=folder / "tensor_parallel_4")
        save(_fsdp_and_tensor_parallel(), checkpoint_id=folder / "fsdp_and_tensor_parallel")
    else:
        state = {"model": _tensor_parallel(world), "step": 3}
        save(state, checkpoint_id=folder / "tensor_parallel")
        waiting: Any = async_save(state, checkpoint_id=folder / "async")
        waiting.result()
        model, moments, flat = _fsdp2(world)
        save({"model": model, "optim": moments}, checkpoint_id=folder / "fsdp2")
        save({"app": _App(model, moments)}, checkpoint_id=folder / "app")
        beside = {
            "lr_scheduler": {"last_epoch": 4},
            "train_state": {"step": torch.tensor(9, dtype=torch.int32), "losses": [1.0, 2.0]},
            "dataloader": {f"dp_rank_{rank}": {"position": rank}},
        }
        save({**model, "optimizer": flat, **beside}, checkpoint_id=folder / "torchtitan")
        model, moments = _fsdp1()
        save({"model": model, "optim": moments}, checkpoint_id=folder / "fsdp1")
        _lightning(rank, folder / "lightning", model, moments)
    dist.barrier()
    dist.destroy_process_group()


def _lightning(rank: int, path: Path, model: dict[str, Any], moments: dict[str, Any]) -> None:
    from lightning.fabric.strategies.fsdp import _distributed_checkpoint_save

    path.mkdir(exist_ok=True)
    _distributed_checkpoint_save({"model": model, "optimizer_0": moments}, path)
    if rank == 0:
        rest = {
            "epoch": 1,
            "pytorch-lightning_version": "2.6.6",
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
            "hyper_parameters": {"lr": 0.1},
        }
        torch.save(rest, path / "meta.pt")
