"""What the ranks of a mesh save of DTensors, by real processes over gloo, and what `full_tensor()` gives.

    make_meshes(tmp_path, world=4)      # about ten seconds

Each folder holds `model_world_size_<world>_rank_<n>.pt`; next to it `<folder>.ref.pt` is the whole. `flat` is
one dimension with uneven and empty pieces, `hsdp` replicates over the first, `fsdp_tp` is torch's own FSDP2
over tensor parallelism (strided pieces), `uneven_tp` the same where nothing divides, `slice` a mesh cut out
of a larger one, `stages` a pipeline whose stages hold other names. This file is also the ranks' program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.ranks import run_ranks

__all__ = ["make_meshes", "run_rank"]

IMPORTS = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel")


def make_meshes(folder: Path, world: int = 4) -> Path:
    """Start the ranks and wait for them; the folder."""
    run_ranks(Path(__file__), [(world, [str(folder)])], imports=IMPORTS)
    return folder


def run_rank(rank: int, world: int, words: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    folder = Path(words)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)

    def save(kind: str, state: dict[str, Any], *, reference: bool = True) -> None:
        path = folder / kind
        path.mkdir(exist_ok=True)
        torch.save(state, path / f"model_world_size_{world}_rank_{rank}.pt")
        if reference:
            whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
            if rank == 0:
                torch.save({k: v.detach().clone() for k, v in whole.items()}, folder / f"{kind}.ref.pt")

    def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))

    flat = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    tensors: dict[str, tuple[torch.Tensor, list[Any]]] = {
        "even": (numbers(4 * world, 6), [Shard(0)]),
        "uneven": (numbers(2 * world + 1, 3).bfloat16(), [Shard(0)]),
        "empty pieces": (numbers(max(world - 1, 1), 2), [Shard(0)]),
        "columns": (numbers(3, 4 * world), [Shard(1)]),
        "uneven columns": (numbers(2, 3, 2 * world + 1).half(), [Shard(2)]),
        "everywhere": (numbers(5), [Replicate()]),
        "scalar": (torch.tensor(2.5), [Replicate()]),
    }
    state: dict[str, Any] = {k: distribute_tensor(v, flat, how) for k, (v, how) in tensors.items()}
    save("flat", {**state, "plain": torch.arange(3)})
    if world % 2 == 0 and world > 1:
        grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        hsdp = {
            "w": distribute_tensor(numbers(10, 3), grid, [Replicate(), Shard(0)]),
            "both": distribute_tensor(numbers(9, 10), grid, [Shard(1), Shard(0)]),
            "twice": distribute_tensor(numbers(11, 2), grid, [Shard(0), Shard(0)]),
        }
        save("hsdp", hsdp)
        for kind, width in (("fsdp_tp", 8 * world), ("uneven_tp", 2 * world + 3)):
            torch.manual_seed(3)
            model = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Linear(width, 5))
            whole = {k: v.detach().clone() for k, v in model.state_dict().items()}
            parallelize_module(model, grid["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
            fully_shard(model, mesh=grid["dp"])
            save(kind, dict(model.state_dict()), reference=False)
            if rank == 0:
                torch.save(whole, folder / f"{kind}.ref.pt")
        save("slice", {"w": distribute_tensor(numbers(7, 3), grid["tp"], [Shard(0)])})
        stage = rank // (world // 2)
        own = {f"layers.{stage}.w": distribute_tensor(numbers(7, 3, seed=stage), grid["tp"], [Shard(0)])}
        save("stages", own, reference=False)
        if rank == 0:
            stages = {f"layers.{n}.w": numbers(7, 3, seed=n) for n in range(2)}
            torch.save(stages, folder / "stages.ref.pt")
    dist.barrier()
    dist.destroy_process_group()
