"""Training dicts as they come: Adam state, prefixes, EMA, Lightning, and all that people put beside weights.

Written by the library that writes such files in the field, from a model that took a few real optimizer
steps where an optimizer's state matters.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import pathlib
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.checkpoints.dtypes import random_state_dict
from tests.checkpoints.models import adopt, convnet, trained, vanished_classes, weights
from tests.checkpoints.registry import Checkpoint, checkpoint


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


@checkpoint(suffix=".ckpt")
def prefix_on_some_names_only(path: Path) -> Checkpoint:
    """`module.w` and `w`: taking the prefix off one would make them one name, so it stays."""
    state = {"module.w": torch.ones(2), "w": torch.zeros(2)}
    torch.save({"model": state}, path)
    return Checkpoint(path, state, options={"strip_prefix": "auto"})


@checkpoint(suffix=".ckpt", reason="output_collision")
def names_that_a_rename_makes_equal(path: Path) -> Checkpoint:
    torch.save({"model": {"student.w": torch.ones(2), "teacher.w": torch.zeros(2)}}, path)
    rename = (("^(student|teacher)[.]", ""),)
    return Checkpoint(path, None, reason="output_collision", options={"rename": rename})


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

        config = adopt(module, Config)()
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


@checkpoint(suffix=".ckpt", thorough=True)
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
