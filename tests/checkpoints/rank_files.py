"""What each of two ranks saves for itself, made by real processes over gloo; about five seconds.

    folders = make_rank_files(tmp_path)

`dtensors/model_world_size_2_rank_<n>.pt` as verl names them, `replicated/state.pt` (whole on every rank),
`mesh_of_one/state.pt`, `partial/state.pt` (summands), `sharded_tensors/rank<n>.pt` (FSDP1), and
`safetensors/` as torch's HuggingFaceStorageWriter writes it. This file is also the ranks' program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.ranks import run_ranks

__all__ = ["full_tensors", "make_rank_files", "run_rank"]

WORLD = 2
IMPORTS = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.tensor",
)


def full_tensors() -> dict[str, torch.Tensor]:
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(11)
    return {
        "a.weight": torch.randn(10, 6, generator=generator),
        "b.weight": torch.randn(7, 3, generator=generator).bfloat16(),
    }


def make_rank_files(folder: Path) -> Path:
    """Start the ranks and wait for them; the folder."""
    run_ranks(Path(__file__), [(WORLD, [str(folder)])], imports=IMPORTS)
    return folder


def _save(content: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def run_rank(rank: int, world: int, words: str) -> None:
    folder = Path(words)
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    full = full_tensors()
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    state = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in full.items()}
    _save({**state, "plain": torch.arange(3.0)}, folder / "dtensors" / f"model_world_size_2_rank_{rank}.pt")
    replicated = {name: distribute_tensor(value, mesh, [Replicate()]) for name, value in full.items()}
    if rank == 0:
        _save(replicated, folder / "replicated" / "state.pt")
    partial = {name: DTensor.from_local(value, mesh, [Partial()]) for name, value in full.items()}
    if rank == 0:
        _save(partial, folder / "partial" / "state.pt")
    for first in range(WORLD):  # every rank takes part in making each group
        alone = DeviceMesh("cpu", [first])
        if rank == first == 0:
            own = {name: distribute_tensor(value, alone, [Shard(0)]) for name, value in full.items()}
            _save(own, folder / "mesh_of_one" / "state.pt")
    torch.manual_seed(5)
    model = torch.nn.Linear(6, 4)
    if rank == 0:
        _save(model.state_dict(), folder / "fsdp1_model.pt")
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT):
        _save(dict(wrapped.state_dict()), folder / "sharded_tensors" / f"rank{rank}.pt")
    _save_safetensors(state, folder / "safetensors")
    dist.barrier()
    dist.destroy_process_group()


def _save_safetensors(state: dict[str, Any], path: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save(state, storage_writer=HuggingFaceStorageWriter(path=str(path), save_distributed=True))
