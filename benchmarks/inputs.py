"""Checkpoints to measure on, written by torch in a process of its own: `python inputs.py KIND PATH N`.

    adam PATH MIB       a training dict of about MIB: a transformer's weights and Adam's two moments
    many FOLDER COUNT   COUNT small training dicts of about 200 KB
    small PATH 0        one state dict of a few kilobytes

Knows nothing of ptbin.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import torch


def _state_dict(weights_nbytes: int) -> OrderedDict[str, torch.Tensor]:
    """Names and shapes of a transformer whose weights come to about that size."""
    # one block holds 12 width^2 parameters of 4 bytes
    blocks = max(2, round(weights_nbytes / (40 << 20)))
    width = max(8, int((weights_nbytes / blocks / 48) ** 0.5) // 8 * 8)
    generator = torch.Generator().manual_seed(0)
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    shapes = {
        "attn.qkv.weight": (3 * width, width),
        "attn.out.weight": (width, width),
        "mlp.up.weight": (4 * width, width),
        "mlp.down.weight": (width, 4 * width),
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
    }
    for block in range(blocks):
        for name, shape in shapes.items():
            state[f"blocks.{block}.{name}"] = torch.empty(shape).normal_(generator=generator)
    return state


def _training_dict(state: OrderedDict[str, torch.Tensor]) -> dict[str, object]:
    moments = {
        index: {"step": torch.tensor(1000.0), "exp_avg": tensor * 0.5, "exp_avg_sq": tensor.square()}
        for index, tensor in enumerate(state.values())
    }
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "params": list(range(len(state)))}]
    return {"epoch": 3, "state_dict": state, "optimizer": {"state": moments, "param_groups": groups}}


def main(kind: str, path: Path, number: int) -> None:
    if kind == "adam":
        torch.save(_training_dict(_state_dict(number * (1 << 20) // 3)), path)
    elif kind == "many":
        for index in range(number):
            target = path / f"run{index // 20}" / f"step{index % 20}.ckpt"
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(_training_dict(_state_dict(64 << 10)), target)
    else:
        torch.save(OrderedDict(w=torch.arange(1000.0), b=torch.zeros(10)), path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
