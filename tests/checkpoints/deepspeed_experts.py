"""A mixture of experts, saved by DeepSpeed on two gloo ranks with an expert each; half a minute.

    folder, expected = train(tmp_path)

The expectation is what the ranks themselves hold. This file is also their program.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

__all__ = ["train"]

WORLD = 2
_EXPERTS = ".deepspeed_experts."


def train(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder with the tag folder in it, and the whole model under the names of one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", __file__, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(WORLD),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "DS_ACCELERATOR": "cpu",
            },
        )
        for rank in range(WORLD)
    ]
    try:
        told = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("DeepSpeed failed:\n" + "\n".join(text[-3000:] for text in told))
    whole: dict[str, torch.Tensor] = {}
    for number in range(WORLD):
        held = torch.load(folder / f"held_{number}.pt", weights_only=True)
        own = f"{_EXPERTS}{number}."
        whole |= {name.replace(f"{_EXPERTS}0.", own): value for name, value in held.items()}
    return folder / "saved", whole


def _run_rank(folder: Path) -> None:
    # By name, and without its C++ collectives, as in `deepspeed_zero`.
    deepspeed = importlib.import_module("deepspeed")
    vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
    deepspeed.init_distributed(dist_backend="gloo")
    mixture = importlib.import_module("deepspeed.moe.layer").MoE
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "first": torch.nn.Linear(4, 4),
            "mixture": mixture(hidden_size=4, expert=torch.nn.Linear(4, 4), num_experts=WORLD, ep_size=WORLD),
        }
    )
    rank = torch.distributed.get_rank()
    for name, parameter in model.named_parameters():
        if _EXPERTS in name:
            parameter.data.fill_(float(rank + 1))
    groups = [
        {"params": [p for n, p in model.named_parameters() if _EXPERTS not in n], "name": "dense"},
        {"params": [p for n, p in model.named_parameters() if _EXPERTS in n], "name": "experts", "moe": True},
    ]
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    engine.save_checkpoint(str(folder / "saved"))
    torch.save(dict(model.state_dict()), folder / f"held_{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
