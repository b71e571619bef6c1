"""Small models to save: built here, trained for a few steps, or of classes that are gone afterwards."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["adopt", "convnet", "trained", "vanished_classes", "weights"]


def convnet(*, seed: int = 0) -> nn.Sequential:
    """A small CNN with BatchNorm: parameters, buffers, an int64 counter, 4-d weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def trained(model: nn.Module, *, steps: int = 3) -> torch.optim.Optimizer:
    """Take a few Adam steps on noise; the optimizer's state is what matters."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(torch.randn(4, 3, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


def weights(model: nn.Module) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((name, tensor.detach().clone()) for name, tensor in model.state_dict().items())


@contextmanager
def vanished_classes(module_name: str = "research_code.models") -> Iterator[types.ModuleType]:
    """A module whose classes can be pickled inside the block and are gone after it."""
    parent = types.ModuleType(module_name.partition(".")[0])
    module = types.ModuleType(module_name)
    names = (parent.__name__, module_name)
    sys.modules.update({parent.__name__: parent, module_name: module})
    setattr(parent, module_name.rpartition(".")[2], module)
    try:
        yield module
    finally:
        for name in names:
            sys.modules.pop(name, None)


def adopt(module: Any, cls: Any) -> Any:
    """Make a class pickle as one of `module`."""
    cls.__module__ = module.__name__
    cls.__qualname__ = cls.__name__
    setattr(module, cls.__name__, cls)
    return cls
