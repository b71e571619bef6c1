"""What a training script has in its hands when it saves; the layouts of `scripts_*` are made of it."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.models import convnet, trained, weights

__all__ = ["Layout", "Run"]


class Run:
    """What a training script has in its hands when it saves."""

    def __init__(self) -> None:
        self.model = convnet()
        self.optimizer = trained(self.model)
        self.state = weights(self.model)

    def adam(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def sgd(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
        return optimizer.state_dict()

    def schedule(self) -> dict[str, Any]:
        return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=10).state_dict()

    def scaler(self) -> dict[str, Any]:
        return {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 3,
        }

    def prefixed(self, prefix: str) -> OrderedDict[str, torch.Tensor]:
        return OrderedDict((prefix + name, tensor) for name, tensor in self.state.items())

    def other(self, seed: int = 9) -> OrderedDict[str, torch.Tensor]:
        """Weights of the same model that are others."""
        return weights(convnet(seed=seed))

    def args(self, **more: Any) -> argparse.Namespace:
        return argparse.Namespace(lr=0.1, batch_size=64, data=Path("/data"), betas=(0.9, 0.999), **more)


Layout = Callable[[Run], Any]
"""What a script saves."""
