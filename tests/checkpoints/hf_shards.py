"""torch's Hugging Face shards, cut by hand as `HuggingFaceStorageWriter(save_distributed=True)` cuts them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["NAME", "write_shards"]

NAME = "shard-{:05d}-model-00001-of-00001.safetensors"


def write_shards(folder: Path, whole: dict[str, torch.Tensor], ranks: int) -> Path:
    """As `HuggingFaceStorageWriter(save_distributed=True)` does for FSDP: cut as `torch.chunk` cuts."""
    folder.mkdir(parents=True)
    for rank in range(ranks):
        held, told = {}, {}
        for name, tensor in whole.items():
            pieces = tensor.chunk(ranks)
            if rank < len(pieces):
                held[name] = pieces[rank].clone()
                start = sum(len(piece) for piece in pieces[:rank])
                told[name] = {"saved_offsets": [start] + [0] * (tensor.dim() - 1)}
        metadata = {"DCP_SHARDING_INFO": json.dumps(told), "DCP_VERSION": "1.0", "format": "pt"}
        save_file(held, folder / NAME.format(rank + 1), metadata)
    return folder
