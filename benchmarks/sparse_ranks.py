"""Rank files of a model of 405 billion parameters (Llama 3.1's sizes, bfloat16) that take next to no disk.

    python -m benchmarks.sparse_ranks FOLDER RANKS

Written by torch itself, which leaves out the storages' bytes (`torch.serialization.skip_data`): the files
have their true size and are holes. An FSDP2 run on one mesh dimension, as verl saves it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

__all__ = ["write_sparse_ranks"]

HIDDEN, FEED_FORWARD, KEYS, VOCABULARY, LAYERS = 16384, 53248, 1024, 128256, 126

_LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _LAYER.items()}
    return {**shapes, "lm_head": (VOCABULARY, HIDDEN)}


def write_sparse_ranks(folder: str, ranks: int) -> str:
    """The files of all ranks; what there is of them, in words."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.simplefilter("ignore")
    Path(folder).mkdir(parents=True)
    elements = 0
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
        state = {}
        for name, (rows, *others) in _shapes().items():
            most = -(-rows // ranks)
            own = max(0, min(most, rows - rank * most))
            local = torch.empty(own, *others, dtype=torch.bfloat16)
            whole = torch.Size((rows, *others))
            stride = torch.empty(whole, device="meta").stride()
            placed = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole, stride=stride)
            state[f"{name}.weight"] = placed
            elements += local.numel()
        with torch.serialization.skip_data():
            torch.save(state, f"{folder}/model_world_size_{ranks}_rank_{rank}.pt")
        dist.destroy_process_group()
    held = sum(path.stat().st_size for path in Path(folder).iterdir())
    taken = sum(path.stat().st_blocks * 512 for path in Path(folder).iterdir())
    size = f"{held / 1e9:.1f} GB in {ranks} files, {taken / 1e6:.1f} MB of disk"
    return f"{elements / 1e9:.1f}e9 parameters, {size}"


if __name__ == "__main__":
    print(write_sparse_ranks(sys.argv[1], int(sys.argv[2])))
