"""What training code leaves behind: whole modules, training dicts, Lightning, EMA, TorchScript, pickles.

Every file here was written by the library that writes such files in the field, from a model that took
a few real optimizer steps where an optimizer's state matters.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import io
import pathlib
import pickle
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.checkpoints.dtypes import random_bits, random_state_dict
from tests.checkpoints.registry import Checkpoint, checkpoint

__all__ = ["convnet", "trained", "vanished_classes"]


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


def _adopt(module: Any, cls: Any) -> Any:
    cls.__module__ = module.__name__
    cls.__qualname__ = cls.__name__
    setattr(module, cls.__name__, cls)
    return cls


# ------------------------------------------------------------------------------------- training dicts


@checkpoint(suffix=".ckpt")
def training_dict_with_adam(path: Path) -> Checkpoint:
    model = convnet()
    optimizer = trained(model)
    torch.save(
        {
            "epoch": 7,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": torch.tensor(0.25),
            "best": 91.78,
        },
        path,
    )
    return Checkpoint(path, weights(model))


def _training_dict_under(key: str) -> None:
    @checkpoint(name=f"training_dict_under_{key}", suffix=".pth")
    def build(path: Path) -> Checkpoint:
        state = random_state_dict()
        torch.save({"step": 10, key: state, "optimizer": {"state": {}, "param_groups": []}}, path)
        return Checkpoint(path, state)


for _key in ("state_dict", "model_state_dict", "model", "module", "net"):
    _training_dict_under(_key)


@checkpoint(suffix=".ckpt")
def training_dict_nested(path: Path) -> Checkpoint:
    state = random_state_dict()
    torch.save({"checkpoint": {"model": {"state_dict": state}, "epoch": 3}}, path)
    return Checkpoint(path, state)


@checkpoint(suffix=".ckpt")
def data_parallel_prefix(path: Path) -> Checkpoint:
    model = nn.DataParallel(convnet())
    torch.save({"state_dict": model.state_dict()}, path)
    return Checkpoint(path, weights(model))


@checkpoint(suffix=".ckpt")
def compiled_and_parallel_prefixes(path: Path) -> Checkpoint:
    state = OrderedDict((f"module._orig_mod.{name}", tensor) for name, tensor in random_state_dict().items())
    torch.save({"model": state}, path)
    return Checkpoint(
        path,
        {name.removeprefix("module._orig_mod."): tensor for name, tensor in state.items()},
        options={"strip_prefix": "auto"},
    )


@checkpoint(suffix=".ckpt", reason="output_collision")
def prefixes_that_collide(path: Path) -> Checkpoint:
    """`module.w` and `w`: one name once the prefix is off."""
    torch.save({"model": {"module.w": torch.ones(2), "w": torch.zeros(2)}}, path)
    return Checkpoint(path, None, reason="output_collision", options={"strip_prefix": "auto"})


@checkpoint(suffix=".ckpt", reason="ambiguous_state_dict")
def ema_next_to_raw(path: Path) -> Checkpoint:
    raw, ema = random_state_dict(seed=1), random_state_dict(seed=50)
    torch.save({"model": raw, "ema_model": ema, "step": 100}, path)
    return Checkpoint(path, None, reason="ambiguous_state_dict")


@checkpoint(suffix=".ckpt")
def ema_selected(path: Path) -> Checkpoint:
    raw, ema = random_state_dict(seed=1), random_state_dict(seed=50)
    torch.save({"model": raw, "ema_model": ema, "step": 100}, path)
    return Checkpoint(path, ema, options={"select": "ema_model"})


@checkpoint(suffix=".ckpt")
def values_beside_tensors(path: Path) -> Checkpoint:
    """Plain values in a state dict stay; `_extra_state` is one of them."""
    state: OrderedDict[str, Any] = OrderedDict(random_state_dict())
    values = {"temperature": 0.07, "version": 3, "name": "encoder", "flag": True, "nothing": None}
    state.update(values)
    state["layer._extra_state"] = {"scale": 2.0, "amax": torch.ones(4)}
    torch.save(state, path)
    return Checkpoint(path, random_state_dict(), values=values)


class _Colour(enum.Enum):
    RED = 1


@checkpoint(suffix=".ckpt", torch_reads=None)
def values_that_weights_only_cannot_read(path: Path) -> Checkpoint:
    """An object of a class that is gone, inside the state dict: left out, and said so."""
    with vanished_classes() as module:

        class Config:
            def __init__(self) -> None:
                self.depth = 3

        config = _adopt(module, Config)()
        state: OrderedDict[str, Any] = OrderedDict(random_state_dict())
        state["config"] = config
        torch.save({"state_dict": state}, path)
    return Checkpoint(path, random_state_dict(), left_out=("config",))


@checkpoint(suffix=".ckpt", torch_reads="pickle")
def training_dict_full_of_python(path: Path) -> Checkpoint:
    """What people put beside the weights: namespaces, paths, dates, enums, random states, sets."""
    model = convnet()
    torch.save(
        {
            "state_dict": model.state_dict(),
            "args": argparse.Namespace(lr=0.1, data=pathlib.Path("/data"), nested={"a": (1, 2, [3])}),
            "when": datetime.datetime(2024, 5, 6, tzinfo=datetime.UTC),
            "colour": _Colour.RED,
            "python_rng": random.getstate(),
            "numpy_rng": np.random.RandomState(3).get_state(),
            "torch_rng": torch.get_rng_state(),
            "set": {1, 2},
            "frozen": frozenset({"x"}),
            "counter": collections.Counter("abc"),
            "default": collections.defaultdict(list, {"k": [1]}),
            "bytes": b"\x00\xff",
            "big": 1 << 200,
            "complex": 1 + 2j,
            "scheduler": torch.optim.lr_scheduler.StepLR(
                torch.optim.SGD(model.parameters(), lr=1.0), 3
            ).state_dict(),
            "best_acc": np.float64(0.93),
            "history": np.arange(10, dtype=np.float32).reshape(2, 5),
        },
        path,
    )
    return Checkpoint(path, weights(model))


# ------------------------------------------------------------------------------------- whole modules


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
            self.blocks = nn.ModuleList(_adopt(module, Block)(6) for _ in range(2))
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight
            self.activation = torch.nn.functional.relu
            self.config = argparse.Namespace(depth=2)

    torch.manual_seed(5)
    model: nn.Module = _adopt(module, Net)()
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


# ---------------------------------------------------------------------------------------- TorchScript


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


# ------------------------------------------------------------------------------------------ Lightning


@checkpoint(suffix=".ckpt")
def lightning_like(path: Path) -> Checkpoint:
    """The layout of `Trainer.save_checkpoint`, hyper-parameters and loops included."""
    model = convnet()
    optimizer = trained(model)
    state = OrderedDict((f"model.{name}", tensor) for name, tensor in model.state_dict().items())
    torch.save(
        {
            "epoch": 1,
            "global_step": 6,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": state,
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
            "callbacks": {
                "ModelCheckpoint{'monitor': None}": {
                    "best_k_models": {},
                    "best_model_score": torch.tensor(0.5),
                }
            },
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [],
            "MixedPrecision": {"scale": 65536.0},
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.01},
        },
        path,
    )
    return Checkpoint(path, {name: tensor.detach() for name, tensor in state.items()})


@checkpoint(suffix=".ckpt")
def lightning_trainer(path: Path) -> Checkpoint:
    """Written by a real `lightning.Trainer` after two batches."""
    import logging

    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"lr": 0.1, "widths": [3, 8]})
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch[0]).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3))
    module = Module()
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=str(path.parent),
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    trainer.save_checkpoint(path)
    return Checkpoint(path, weights(module))


# ------------------------------------------------------------------------------- raw pickles and numpy


def _raw_pickle(protocol: int) -> None:
    @checkpoint(name=f"pickle_dump_protocol_{protocol}", suffix=".pkl", torch_reads=None)
    def build(path: Path) -> Checkpoint:
        """`pickle.dump(state_dict)`: each storage is a legacy torch file, inside `_load_from_bytes`."""
        state = random_state_dict()
        path.write_bytes(pickle.dumps(state, protocol=protocol))
        return Checkpoint(path, state)


for _protocol in (2, 3, 4, 5):
    _raw_pickle(_protocol)


@checkpoint(suffix=".pkl", torch_reads=None)
def pickle_dump_of_a_tie(path: Path) -> Checkpoint:
    shared = random_bits(torch.float32, (4, 4))
    state = {"a": shared, "b": shared, "t": shared.t()}
    path.write_bytes(pickle.dumps(state))
    return Checkpoint(path, state)


@checkpoint(torch_reads="pickle")
def nested_load_from_bytes(path: Path) -> Checkpoint:
    """A tensor pickled by the standard pickler inside bytes of a torch file: an opaque value."""
    inner = io.BytesIO()
    pickle.dump(torch.ones(3), inner)
    state = random_state_dict()
    torch.save({"state_dict": state, "blob": inner.getvalue()}, path)
    return Checkpoint(path, state)


@checkpoint(suffix=".pkl", torch_reads="pickle")
def numpy_state_dict(path: Path) -> Checkpoint:
    """Weights kept as numpy arrays (detectron2's model zoo): C and Fortran order, big-endian, 0-d."""
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
        "half": np.arange(5, dtype=np.float16),
        "big_endian": np.arange(6, dtype=">f4"),
        "mask": np.array([True, False]),
        "zero_d": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 3), dtype=np.uint8),
    }
    torch.save({"model": arrays, "__author__": "third party"}, path)
    expected = {
        name: torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        for name, array in arrays.items()
    }
    return Checkpoint(path, expected)


@checkpoint(torch_reads="pickle")
def numpy_scalars_beside_weights(path: Path) -> Checkpoint:
    state = random_state_dict()
    torch.save(
        {"state_dict": state, "best": np.float32(0.5), "when": np.datetime64("2024-01-02"), "n": np.int64(3)},
        path,
    )
    return Checkpoint(path, state)


# ---------------------------------------------------------------------------------- nothing to convert


def _without_weights(name: str, value: Any) -> None:
    @checkpoint(name=name, reason="no_state_dict")
    def build(path: Path) -> Checkpoint:
        torch.save(value, path)
        return Checkpoint(path, None, reason="no_state_dict")


for _name, _value in {
    "list_of_tensors": [torch.ones(2), torch.zeros(3)],
    "one_bare_tensor": torch.arange(6.0),
    "dict_of_numbers": {"epoch": 3, "lr": 0.1},
    "empty_dict": {},
    "just_a_string": "hello",
    "just_none": None,
    "optimizer_only": {
        "state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(3.0)}},
        "param_groups": [{"params": [0]}],
    },
}.items():
    _without_weights(_name, _value)
