"""The model classes of the people who train: what their pickles name."""

from __future__ import annotations

import torch
from torch import nn


class Classifier(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x)).relu()
        said: torch.Tensor = self.last(hidden)
        return said


def seeded(seed: int) -> Classifier:
    """One of many that differ only in their weights."""
    torch.manual_seed(seed)
    return Classifier().eval()


def answer(net: nn.Module) -> list[float]:
    """What it says to one input: tells whose weights it has."""
    with torch.no_grad():
        return [round(float(value), 5) for value in net(torch.linspace(-1, 1, 6)[None])[0]]
