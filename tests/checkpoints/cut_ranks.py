"""Every rank's file of tensors that torch places on a mesh, written by one process.

    cut_ranks(tmp_path, (2, 2), {"w": (tensor, [Replicate(), Shard(0)])})

The process group's other ranks are only claimed: cutting a tensor needs no word of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["as_rank", "cut_ranks"]


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """This process as one of so many."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def cut_ranks(
    folder: Path,
    grid: tuple[int, ...],
    tensors: Mapping[str, tuple[torch.Tensor, list[Any]]],
    name: str = "model_world_size_{world}_rank_{rank}.pt",
    **beside: Any,
) -> Path:
    """The folder of all ranks' files; `beside` is in each of them as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    folder.mkdir(exist_ok=True, parents=True)
    world = torch.Size(grid).numel()
    for rank in range(world):
        with as_rank(rank, world):
            mesh = init_device_mesh("cpu", grid)
            state = {
                k: distribute_tensor(v, mesh, how, src_data_rank=None) for k, (v, how) in tensors.items()
            }
            torch.save({**state, **beside}, folder / name.format(world=world, rank=rank))
    return folder
