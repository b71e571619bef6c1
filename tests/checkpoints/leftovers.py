"""What training leaves next to a model's weights, under the names that trainers give it."""

from __future__ import annotations

import argparse
import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["NAMES", "leftovers", "write_training_folder"]

NAMES = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_1.pth"),
    *("random_states_0.pkl", "scaler.pt", "training_args.bin", "extra_state_world_size_2_rank_0.pt"),
    "optim_world_size_2_rank_0.pt",
)
"""The keys of `leftovers`, which imports all of torch's compiler with the first optimizer."""


@functools.cache
def leftovers() -> dict[str, tuple[str, Any]]:
    """File name to what it is and its content, made by torch's own objects."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    momentum.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    generators = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - it is what transformers' trainer saves
        "cpu": torch.random.get_rng_state(),
    }
    seeds = {
        "step": 3,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),  # noqa: NPY002 - as accelerate does
        "torch_manual_seed": torch.get_rng_state(),
    }
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    return {
        "optimizer.pt": ("optimizer", optimizer.state_dict()),
        "optimizer.bin": ("optimizer", momentum.state_dict()),
        "scheduler.pt": ("scheduler", scheduler.state_dict()),
        "rng_state.pth": ("random generators", generators),
        "rng_state_1.pth": ("random generators", generators),
        "random_states_0.pkl": ("random generators", seeds),
        "scaler.pt": ("scaler", {**scaler, "_growth_tracker": 0}),
        "training_args.bin": ("training arguments", argparse.Namespace(lr=0.1)),
        "extra_state_world_size_2_rank_0.pt": (
            "training state",
            {"lr_scheduler": scheduler.state_dict(), "rng": generators},
        ),
        "optim_world_size_2_rank_0.pt": ("optimizer", optimizer.state_dict()),
    }


def write_training_folder(folder: Path) -> int:
    """One model and all leftovers; how many these are."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(torch.nn.Linear(3, 2).state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    for name, (_, content) in leftovers().items():
        torch.save(content, folder / name)
    return len(leftovers())
