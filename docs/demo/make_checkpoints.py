"""Train a few small models for some steps and save them the ways that people do.

Owns the demo's input: five genuine files, each of another kind, one of them hostile. Knows nothing of
ptbin. Takes about ten seconds on two cores.
"""

from __future__ import annotations

import os
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["HOSTILE", "make_checkpoints"]

HOSTILE = "from-a-stranger/model.pt"
"""The one file that a converter must refuse."""


def _pictures(steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Noise with a horizontal or a vertical bar in it; the label says which."""
    for _ in range(steps):
        images = torch.randn(32, 1, 16, 16) * 0.5
        labels = torch.randint(0, 2, (32,))
        for image, label in zip(images, labels, strict=True):
            at = int(torch.randint(2, 14, ()))
            if label:
                image[0, at] += 2
            else:
                image[0, :, at] += 2
        yield images, labels


def _train_cnn(path: Path, *, steps: int, legacy: bool = False) -> None:
    """A CNN with BatchNorm, saved with Adam's state, which is twice the size of the weights."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(1024, 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = torch.tensor(0.0)
    for images, labels in _pictures(steps):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    content: dict[str, Any] = {
        "epoch": 1,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "loss": float(loss.detach()),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


class _Transformer(nn.Module):
    """Next-character model whose output layer is its embedding (one storage, two names)."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.blocks(self.embed(tokens) + self.position[:length], mask=mask, is_causal=True)
        logits: torch.Tensor = self.head(hidden)
        return logits


def _train_transformer(path: Path, *, steps: int) -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    data = torch.tensor([alphabet.index(char) for char in text])
    model = _Transformer(len(alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(data) - 65, (16,))
        batch = torch.stack([data[start : start + 65] for start in starts])
        logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "vocabulary": alphabet}, path
    )


def _save_whole_module(path: Path) -> None:
    """`torch.save(model)`: the file names a class, in a module that exists nowhere but here and now."""
    module = types.ModuleType("research_code")

    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
            self.register_buffer("mean", torch.randn(8))

    Regressor.__module__, Regressor.__qualname__ = "research_code", "Regressor"
    module.Regressor = Regressor  # type: ignore[attr-defined]
    sys.modules["research_code"] = module
    try:
        torch.save(Regressor(), path)
    finally:
        del sys.modules["research_code"]


class _RunsWhenLoaded:
    """What pickle calls on loading is whatever `__reduce__` names."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


def _save_hostile(path: Path, trap: Path) -> None:
    command = f"touch {shlex.quote(str(trap))}"
    torch.save({"state_dict": nn.Linear(4, 4).state_dict(), "config": _RunsWhenLoaded(command)}, path)


def make_checkpoints(folder: Path, trap: Path) -> list[Path]:
    """Write the five files below `folder`; whoever unpickles the hostile one creates `trap`."""
    torch.manual_seed(0)
    makers = {
        "cnn/last.ckpt": lambda path: _train_cnn(path, steps=40),
        "transformer/last.pt": lambda path: _train_transformer(path, steps=40),
        "regressor/model.pth": _save_whole_module,
        "archive/2019.pth": lambda path: _train_cnn(path, steps=5, legacy=True),
        HOSTILE: lambda path: _save_hostile(path, trap),
    }
    for name, make in makers.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    return [folder / name for name in makers]
