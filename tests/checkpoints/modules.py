"""Whole modules, pickled with or without classes that still exist, and TorchScript archives."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.checkpoints.models import adopt, convnet, trained, vanished_classes, weights
from tests.checkpoints.registry import Checkpoint, checkpoint


def _network(module: Any) -> nn.Module:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)
            self.norm = nn.BatchNorm1d(width)
            self.register_buffer("scratch", torch.full((width,), 9.0), persistent=False)
            self.register_buffer("mask", torch.ones(width, dtype=torch.bool))
            self.register_parameter("absent", None)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.blocks = nn.ModuleList(adopt(module, Block)(6) for _ in range(2))
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight
            self.activation = torch.nn.functional.relu
            self.config = argparse.Namespace(depth=2)

    torch.manual_seed(5)
    model: nn.Module = adopt(module, Net)()
    return model


def _whole_module(path: Path, **options: Any) -> Checkpoint:
    with vanished_classes() as module:
        model = _network(module)
        torch.save(model, path, **options)
    return Checkpoint(path, weights(model))


@checkpoint(torch_reads=None)
def whole_module_with_vanished_classes(path: Path) -> Checkpoint:
    """Tied, with a non-persistent buffer (which stays out) and a parameter that is None."""
    return _whole_module(path)


@checkpoint(torch_reads=None)
def legacy_whole_module_with_vanished_classes(path: Path) -> Checkpoint:
    return _whole_module(path, _use_new_zipfile_serialization=False)


@checkpoint(torch_reads="pickle")
def whole_module_of_torch_layers(path: Path) -> Checkpoint:
    model = convnet()
    trained(model)
    torch.save(model, path)
    return Checkpoint(path, weights(model))


@checkpoint(suffix=".ckpt", torch_reads=None)
def whole_module_in_a_training_dict(path: Path) -> Checkpoint:
    with vanished_classes("yolo.models.experimental") as module:
        model = _network(module)
        torch.save({"epoch": -1, "model": model, "ema": None, "optimizer": None, "wandb_id": "x"}, path)
    return Checkpoint(path, weights(model))


@checkpoint(torch_reads="pickle")
def data_parallel_whole_module(path: Path) -> Checkpoint:
    model = nn.DataParallel(convnet())
    torch.save(model, path)
    return Checkpoint(path, weights(model))


@checkpoint(torch_reads="pickle")
def module_with_lstm_and_parametrization(path: Path) -> Checkpoint:
    """`nn.LSTM` carries its flat weights a second time; transformers' layers have __setstate__."""
    torch.manual_seed(2)
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(4, 5, num_layers=2, bidirectional=True),
            "encoder": nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False
            ),
            "list": nn.ParameterList([nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3))]),
            "dict": nn.ParameterDict({"a": nn.Parameter(torch.randn(2))}),
        }
    )
    torch.save(model, path)
    return Checkpoint(path, weights(model))


class _WithExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def get_extra_state(self) -> Any:
        return {"amax": torch.ones(2), "recipe": "e4m3"}

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set."""


@checkpoint()
def state_dict_with_extra_state(path: Path) -> Checkpoint:
    model = nn.Sequential(_WithExtraState(), nn.Linear(2, 2))
    torch.save(model.state_dict(), path)
    tensors = {
        name: value.detach() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }
    return Checkpoint(path, tensors)


@checkpoint(torch_reads=None)
def torchscript(path: Path) -> Checkpoint:
    model = convnet().eval()
    torch.jit.script(model).save(str(path))
    return Checkpoint(path, weights(model))


@checkpoint(torch_reads=None)
def torchscript_traced(path: Path) -> Checkpoint:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    torch.jit.trace(model, torch.zeros(1, 4)).save(str(path))
    return Checkpoint(path, weights(model))
