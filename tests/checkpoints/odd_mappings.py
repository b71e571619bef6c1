"""State dicts in mappings that are not plain ones, and names that mean something else than they say.

Lists of pairs, namedtuples, `UserDict`s, keys that are no text, values that are no tensors; averaged copies
by the program that wrote them; modules that are named like optimizers.
"""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tests.checkpoints.falling_short import Case, case
from tests.checkpoints.models import convnet, trained, weights

__all__ = ["Slotted"]


def _linear(seed: int = 5) -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return weights(nn.Linear(4, 3))


class _Ordered(OrderedDict[str, Any]):
    """`addict.Dict` and omegaconf's likes: a subclass of a dict with attributes."""


class _Addict(dict[str, Any]):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        object.__setattr__(self, "__frozen", False)


class _Checkpointed(NamedTuple):
    model: Any
    epoch: int


@dataclass(slots=True)
class Slotted:
    model: Any
    step: int = 0


@dataclass
class _Trainer:
    network: Any
    optimizer: Any
    epoch: int = 3


@case()
def list_of_lists_as_pairs() -> Case:
    return [[name, value] for name, value in _linear().items()], _linear()


@case()
def pairs_below_a_key() -> Case:
    return {"model": list(_linear().items()), "epoch": 1}, _linear()


@case()
def named_tuple_with_a_model() -> Case:
    return _Checkpointed(_linear(), 3), _linear()


@case()
def user_dict_at_the_top() -> Case:
    return UserDict(_linear()), _linear()


@case()
def user_dict_below() -> Case:
    return {"state_dict": UserDict(_linear()), "optimizer": trained(convnet()).state_dict()}, _linear()


@case()
def addict_with_a_model() -> Case:
    return _Addict({"model": _Addict(_linear()), "epoch": 3}), _linear()


@case()
def subclass_of_an_ordered_dict() -> Case:
    return {"net": _Ordered(_linear())}, _linear()


@case()
def default_dict_of_tensors() -> Case:
    made: defaultdict[str, Any] = defaultdict(list)
    made.update(_linear())
    return {"model": made}, _linear()


@case()
def slots_with_a_model() -> Case:
    return Slotted(_linear()), _linear()


@case()
def trainer_object() -> Case:
    """An object with a module and an optimizer for attributes."""
    model = convnet()
    return _Trainer(model, trained(model)), weights(model)


@case("ambiguous_state_dict")
def integer_keys_alone() -> Case:
    return {0: torch.randn(3, 3), 1: torch.randn(3)}, None


@case("unsupported_tensor", select="model")
def integer_key_among_names_selected() -> Case:
    return {"model": {"w": torch.randn(3), 7: torch.randn(2)}}, None


@case(flatten=True, select="model")
def integer_keys_flattened() -> Case:
    layers = {0: torch.randn(3), 1: torch.randn(2)}
    state: dict[str, Any] = {"layers": layers, "head": _linear(), "w": torch.randn(2)}
    wanted = {"layers.0": layers[0], "layers.1": layers[1], "w": state["w"]}
    return {"model": state}, wanted | {f"head.{n}": t for n, t in _linear().items()}


@case("ambiguous_state_dict")
def tuple_keys() -> Case:
    return {"model": {("a", 0): torch.randn(3), ("b", 1): torch.randn(2)}}, None


@case("ambiguous_state_dict")
def module_lists_as_lists() -> Case:
    return {"model": {"w": torch.randn(3), "blocks": [_linear(1), _linear(2)]}}, None


@case(flatten=True, select="model")
def module_lists_as_lists_flattened() -> Case:
    value: dict[str, Any] = {"w": torch.randn(3), "blocks": [_linear(1), _linear(2)]}
    blocks = {f"blocks.{i}.{n}": t for i, block in enumerate((1, 2)) for n, t in _linear(block).items()}
    return {"model": value}, {"w": value["w"], **blocks}


@case("ambiguous_state_dict")
def tuple_of_tensors_in_a_state_dict() -> Case:
    return {"model": {**_linear(), "bounds": (torch.randn(3), torch.randn(3))}}, None


@case("ambiguous_state_dict")
def extra_state_beside_a_tuple() -> Case:
    """`_extra_state` is never the model, whatever the rest of it is turned down for."""
    return {"state_dict": {"w": torch.randn(3), "t": (torch.randn(2),), "_extra_state": _linear()}}, None


@case("ambiguous_state_dict")
def arrays_among_tensors() -> Case:
    return {"model": _linear(), "codebook": np.random.RandomState(0).rand(30, 8).astype(np.float32)}, None


@case("unsupported_tensor")
def arrays_inside_the_state_dict() -> Case:
    return {"model": {**_linear(), "codebook": np.random.RandomState(0).rand(9, 8).astype(np.float32)}}, None


# ---- names that mean something else than they say


class _Misleading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.opt = nn.Linear(2, 2)
        self.optimal_transport = nn.Linear(2, 2)
        self.loss_net = nn.Linear(2, 2)
        self.step_encoder = nn.Linear(2, 2)
        self.reward_model = nn.Linear(2, 2)
        self.config_net = nn.Linear(2, 2)
        self.scheduler = nn.Linear(2, 2)
        self.rng = nn.Linear(2, 2)
        self.exp_avg = nn.Parameter(torch.randn(3))
        self.step = nn.Parameter(torch.randn(3))
        self.sum = nn.Parameter(torch.randn(3))
        self.register_buffer("ema", torch.randn(3))


@case(reads="weights_only")
def modules_named_like_optimizers() -> Case:
    model = _Misleading()
    return model.state_dict(), weights(model)


@case(reads="weights_only")
def modules_named_like_optimizers_in_a_dict() -> Case:
    model = _Misleading()
    return {"model": model.state_dict(), "optimizer": trained(convnet()).state_dict()}, weights(model)


@case(flatten=True)
def modules_named_like_optimizers_flattened() -> Case:
    parts = {name: _linear(i) for i, name in enumerate(("opt", "loss_net", "reward_model", "config", "step"))}
    flat = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    return {**parts, "foo": trained(convnet()).state_dict(), "epoch": 3}, flat


@case("no_state_dict")
def optimizer_alone() -> Case:
    return trained(convnet()).state_dict(), None


@case("no_state_dict")
def optimizers_alone_by_name() -> Case:
    return {"foo": trained(convnet()).state_dict(), "bar": [trained(convnet()).state_dict()]}, None


@case("no_state_dict")
def running_statistics_alone() -> Case:
    return {"obs_rms": _RunningMeanStd()}, None


class _RunningMeanStd:
    def __init__(self) -> None:
        self.mean, self.var, self.count = np.zeros(4), np.ones(4), 1e-4


@case("no_state_dict")
def scheduler_with_a_tensor() -> Case:
    return {"best": torch.tensor(0.5), "cooldown_counter": 0, "num_bad_epochs": 2, "_last_lr": [0.1]}, None


# ---- averaged copies, by who wrote them


def _double(seed: int) -> OrderedDict[str, torch.Tensor]:
    return weights(convnet(seed=seed))


@case(reads="weights_only")
def fairseq_with_an_average() -> Case:
    """fairseq itself loads `model`; the average lies with the trainer's state and is listed as a copy."""
    return {"model": _double(1), "extra_state": {"epoch": 1, "ema": _double(2)}, "args": None}, _double(1)


@case(select="ema")
def fairseq_average() -> Case:
    return {"model": _double(1), "extra_state": {"epoch": 1, "ema": _double(2)}, "args": None}, _double(2)


@case(select="ema")
def mmcv_average() -> Case:
    """mmcv's EMAHook swaps: the plain names are the average, the buffers `ema_...` the raw weights."""
    raw = {f"ema_{name.replace('.', '_')}": value for name, value in _double(1).items()}
    return {"meta": {"mmcv_version": "1.7.0"}, "state_dict": {**_double(2), **raw}}, _double(2)


@case(select="ema")
def lightning_average() -> Case:
    value = {
        "pytorch-lightning_version": "2.6.6",
        "epoch": 1,
        "global_step": 4,
        "loops": {},
        "callbacks": {},
        "state_dict": _double(2),
        "current_model_state": _double(1),
        "averaging_state": {"n_averaged": torch.tensor(4)},
        "optimizer_states": [trained(convnet()).state_dict()],
        "lr_schedulers": [],
    }
    return value, _double(2)


@case(select="ema")
def ultralytics_average() -> Case:
    return {"epoch": 1, "model": convnet(seed=1), "ema": convnet(seed=2), "updates": 5}, _double(2)


@case(select="ema")
def shadow_parameters() -> Case:
    """diffusers' and torch_ema's averages are lists in the order of the parameters."""
    model, other = convnet(seed=1), convnet(seed=2)
    shadow = [tensor.detach() for tensor in other.parameters()]
    value = {"net": weights(model), "ema": {"decay": 0.99, "num_updates": 3, "shadow_params": shadow}}
    return value, {name: tensor.detach() for name, tensor in other.named_parameters()}


@case("ambiguous_state_dict")
def swa_beside_the_model() -> Case:
    average = torch.optim.swa_utils.AveragedModel(convnet(seed=2))
    return {"model": _double(1), "swa_model": average.state_dict()}, None


@case(select="ema")
def swa_selected() -> Case:
    average = torch.optim.swa_utils.AveragedModel(convnet(seed=2))
    return {"model": _double(1), "swa_model": average.state_dict()}, weights(average)
