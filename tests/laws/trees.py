"""Random checkpoints: state dicts and modules of all kinds, and what scripts save beside them.

Owns how they are drawn; what must hold of them is in `law`. Every storage is filled with random bytes of its
own. Each drawn `Tree` says where the models' weights are, and whether it is `ordinary`: one model, and
nothing beside it but what every converter should know.
"""

from __future__ import annotations

import argparse
import io
import random
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

__all__ = ["Tree", "trees"]

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
)
NAMES = """
    weight bias conv.weight conv.bias layers.0.weight layers.1.weight head.weight running_mean
    num_batches_tracked pos_embed cls_token opt.weight loss_net.weight step_encoder.bias mu sum z step exp_avg
    ema.weight scale lr epoch best optimizer.weight rng_state queue alpha A.0 blocks 7 state param_groups
""".split()
PLAIN_MODEL_KEYS = "model state_dict net module network params model_state_dict generator encoder".split()
MODEL_KEYS = [
    *PLAIN_MODEL_KEYS,
    *"policy G best_state backbone actor ema student opt loss_net config_net reward_model".split(),
    *"step_encoder optimal_transport scheduler_net foo".split(),
]


@dataclass
class Tree:
    """A value to save, where the models in it are, and whether it is an ordinary checkpoint."""

    value: Any
    models: list[str]
    ordinary: bool


class Plain(torch.Tensor):
    """A subclass without anything of its own."""


class Scaled(torch.Tensor):
    """A wrapper: no data, and attributes that have it."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self._data, self._scale = data, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(func)


class Pair(NamedTuple):
    model: Any
    rest: Any


@dataclass
class Trainer:
    model: Any
    rest: Any


@dataclass(slots=True)
class Slots:
    model: Any
    rest: Any


class Mapped(OrderedDict[str, Any]):
    """A subclass of a mapping, as configuration libraries have them."""


class Block(nn.Module):
    """Everything a module can hold."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.weight = nn.Parameter(source.floats(3, 4))
        self.register_buffer("mean", source.floats(4))
        self.register_buffer("scratch", source.floats(5), persistent=False)
        self.register_parameter("absent", None)
        self.grids = [source.floats(2, 2)]
        self.table = {"anchors": source.floats(3)}
        self.cache = np.frombuffer(source.raw(24), dtype=np.float32)


class OwnState(nn.Module):
    """Pickles itself as a tuple."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.weight = nn.Parameter(source.floats(3, 4))

    def __getstate__(self) -> Any:
        return (self.training, self.weight)

    def __setstate__(self, state: Any) -> None:
        nn.Module.__init__(self)
        self.training, self.weight = state


def _rebuilt(cls: Any, state: Any) -> Any:
    made = cls.__new__(cls)
    made.__dict__.update(state)
    return made


class OwnReduce(nn.Linear):
    """Pickles itself as a call."""

    def __reduce__(self) -> Any:
        return _rebuilt, (type(self), dict(self.__dict__))


@dataclass
class Source:
    """Tensors of random bytes, each of its own."""

    rng: random.Random
    made: list[torch.Tensor] = field(default_factory=list)

    def raw(self, nbytes: int) -> bytearray:
        return bytearray(self.rng.randbytes(nbytes))

    def tensor(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        count = int(np.prod(shape)) if shape else 1
        if dtype is torch.bool:
            raw = bytearray(byte & 1 for byte in self.raw(count))
        else:
            raw = self.raw(count * dtype.itemsize)
        if not count:
            return torch.zeros(shape, dtype=dtype)
        tensor = torch.frombuffer(raw, dtype=torch.uint8).clone().view(dtype).reshape(shape)
        self.made.append(tensor)
        return tensor

    def floats(self, *shape: int) -> torch.Tensor:
        return self.tensor(torch.float32, *shape)

    def array(self, *shape: int) -> np.ndarray[Any, Any]:
        return np.frombuffer(self.raw(4 * int(np.prod(shape))), dtype=np.float32).reshape(shape)


# ---- tensors


def _with_attribute(source: Source) -> Any:
    parameter: Any = nn.Parameter(source.floats(3, 4))
    parameter.scale = source.floats(3)
    return parameter


KINDS: dict[str, Callable[[Source], Any]] = {
    "slice": lambda s: s.floats(6, 4)[1:3],
    "column": lambda s: s.floats(6, 4)[:, 1],
    "transposed": lambda s: s.floats(3, 4).t(),
    "expanded": lambda s: s.floats(1, 4).expand(3, 4),
    "scalar": lambda s: s.floats(),
    "empty": lambda s: torch.zeros(0, 4),
    "step": lambda s: s.floats(8)[::2],
    "parameter": lambda s: nn.Parameter(s.floats(3, 4)),
    "subclass": lambda s: s.floats(3, 4).as_subclass(Plain),
    "sparse": lambda s: torch.sparse_coo_tensor(torch.tensor([[0, 2]]), s.floats(2), (4,)),
    "csr": lambda s: torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2]), torch.tensor([0, 1]), s.floats(2), (2, 2)
    ),
    "quantized": lambda s: torch.quantize_per_tensor(torch.randn(2, 4), 0.1, 3, torch.qint8),
    "channels": lambda s: torch.quantize_per_channel(
        torch.randn(2, 4), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
    ),
    "complex": lambda s: s.tensor(torch.complex64, 3),
    "meta": lambda s: torch.empty(3, 4, device="meta"),
    "wrapper": lambda s: Scaled(s.tensor(torch.int8, 3, 4), s.floats(3)),
    "attributes": _with_attribute,
}


@st.composite
def _tensors(draw: st.DrawFn, source: Source) -> Any:
    choice = draw(st.integers(0, 9))
    if choice < 5:
        shape = draw(st.sampled_from([(3, 4), (4,), (2, 3, 1), (1,), ()]))
        return source.tensor(draw(st.sampled_from(DTYPES)), *shape)
    if choice == 5 and source.made:
        return draw(st.sampled_from(source.made))
    if choice == 6 and source.made:
        return draw(st.sampled_from(source.made)).reshape(-1)[: draw(st.integers(0, 3))]
    return KINDS[draw(st.sampled_from(sorted(KINDS)))](source)


# ---- models

MAPPINGS: tuple[Callable[[dict[Any, Any]], Any], ...] = (
    dict,
    OrderedDict,
    Mapped,
    UserDict,
    lambda d: defaultdict(list, d),
    lambda d: list(d.items()),
)


def _odd_value(source: Source, which: int) -> Any:
    return (
        (source.floats(3), source.floats(2)),
        {"amax": source.floats(3)},
        [source.floats(2), 3],
        {0: source.floats(2)},
        source.array(3, 2),
        {"inner": {"weight": source.floats(2, 2)}},
        Trainer(source.floats(2), None),
        (torch.quantize_per_tensor(torch.randn(2, 2), 0.1, 0, torch.qint8), source.floats(2)),
    )[which]


@st.composite
def _state_dicts(draw: st.DrawFn, source: Source, *, ordinary: bool) -> Any:
    # one name at least that a counter would not have: `{"lr": T, "step": T}` is nobody's model
    names = [draw(st.sampled_from(NAMES[:12]))]
    names += draw(
        st.lists(st.sampled_from([name for name in NAMES if name != names[0]]), max_size=5, unique=True)
    )
    if ordinary:
        return OrderedDict((name, source.floats(3, 4)) for name in names)
    state: dict[Any, Any] = {name: draw(_tensors(source)) for name in names}
    extra = draw(st.integers(0, 9))
    if extra == 0:
        state["version"] = 3
    elif extra == 1:
        state["layer._extra_state"] = _odd_value(source, draw(st.integers(0, 7)))
    elif extra == 2:
        state["odd"] = _odd_value(source, draw(st.integers(0, 7)))
    elif extra == 3:
        state[7] = source.floats(3)
    elif extra == 4:
        state["a", 1] = source.floats(3)
    return draw(st.sampled_from(MAPPINGS))(state)


@st.composite
def _modules(draw: st.DrawFn, source: Source, *, ordinary: bool) -> Any:
    children: list[nn.Module] = [Block(source)]
    for kind in draw(st.lists(st.integers(0, 8), max_size=3)):
        child: Any = nn.Linear(3, 2)
        if kind == 1:
            child = nn.BatchNorm1d(3)
        elif kind == 2:
            child = nn.LSTM(2, 2)
        elif kind == 3:
            child = torch.compile(nn.Linear(2, 2))
        elif kind == 4 and not ordinary:
            child = OwnState(source)
        elif kind == 5 and not ordinary:
            child = OwnReduce(2, 2)
        elif kind == 6:
            child = nn.ModuleDict({"a": children[0], "b": nn.ParameterList([source.floats(2)])})
        elif kind == 7 and not ordinary:
            child.weight.scale = source.floats(2)
        elif kind == 8:
            child = nn.Embedding(5, 2)
        children.append(child)
    model = nn.Sequential(*children)
    if draw(st.integers(0, 5)) == 0:
        return torch.compile(model)
    if draw(st.integers(0, 5)) == 0:
        return nn.DataParallel(model)
    return model


# ---- what is saved beside a model

OPTIMIZERS: tuple[Callable[[Any], torch.optim.Optimizer], ...] = (
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.Adam(p, amsgrad=True),
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    torch.optim.Rprop,
    torch.optim.ASGD,
    torch.optim.LBFGS,
    torch.optim.Adafactor,
    lambda p: torch.optim.SGD(p, lr=0.1),
)


def _optimizer(which: int) -> torch.optim.Optimizer:
    model = nn.Linear(3, 2)
    optimizer: Any = OPTIMIZERS[which % len(OPTIMIZERS)](model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.randn(4, 3)).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    made: torch.optim.Optimizer = optimizer
    return made


def _schedulers(which: int) -> Any:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler
    made: Any = (
        lambda: schedule.StepLR(optimizer, 3),
        lambda: schedule.CosineAnnealingLR(optimizer, 10),
        lambda: schedule.ReduceLROnPlateau(optimizer),
        lambda: schedule.OneCycleLR(optimizer, 0.1, 10),
        lambda: schedule.LambdaLR(optimizer, lambda epoch: 1.0),
        lambda: schedule.CyclicLR(optimizer, 0.1, 0.2),
        lambda: schedule.SequentialLR(
            optimizer, [schedule.ConstantLR(optimizer), schedule.StepLR(optimizer, 2)], [3]
        ),
        lambda: schedule.CosineAnnealingWarmRestarts(optimizer, 10),
        lambda: schedule.MultiStepLR(optimizer, [1, 2]),
    )[which % 9]()
    return made.state_dict()


KNOWN: tuple[Callable[[Source, int], tuple[str, Any]], ...] = (
    lambda s, n: (
        ("optimizer", "opt", "foo", "optim_g", "optimizer_states")[n % 5],
        _optimizer(n).state_dict(),
    ),
    lambda s, n: ("optimizers", [_optimizer(n).state_dict(), _optimizer(n + 1).state_dict()]),
    lambda s, n: ("opt_by_name", {"a": _optimizer(n).state_dict(), "b": _optimizer(n + 1).state_dict()}),
    lambda s, n: ("optimizer_object", _optimizer(n)),
    lambda s, n: (("scheduler", "lr_sched", "bar", "warmup")[n % 4], _schedulers(n)),
    lambda s, n: ("schedulers", [_schedulers(n), _schedulers(n + 1)]),
    lambda s, n: ("rng_state", torch.get_rng_state()),
    lambda s, n: ("rng", {"torch": torch.get_rng_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)]}),
    lambda s, n: ("numpy_random", np.random.RandomState(n).get_state()),
    lambda s, n: ("python_random", random.Random(n).getstate()),
    lambda s, n: ("args", argparse.Namespace(lr=0.1, mean=np.ones(3), weights=torch.ones(3))),
    lambda s, n: ("config", {"anchors": s.floats(3, 2), "size": (3, 4)}),
    lambda s, n: ("hyper_parameters", {"class_weight": s.floats(5)}),
    lambda s, n: ("best_acc", torch.tensor(0.5)),
    lambda s, n: ("train_losses", s.floats(20)),
    lambda s, n: ("history", {"loss": [torch.tensor(0.3), torch.tensor(0.2)], "acc": s.array(9)}),
    lambda s, n: ("epoch", n),
    lambda s, n: ("ema", None),
    lambda s, n: ("global_step", torch.tensor(n)),
    lambda s, n: (
        "scaler",
        {
            "scale": 2.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2,
            "_growth_tracker": 0,
        },
    ),
    lambda s, n: ("callbacks", {"EarlyStopping": {"best_score": torch.tensor(0.1), "wait_count": n}}),
    lambda s, n: ("indices", torch.arange(n + 2)),
)


def _blob(source: Source) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": source.floats(3, 3)}, file)
    return file.getvalue()


UNKNOWN: tuple[Callable[[Source], tuple[str, Any]], ...] = (
    lambda s: ("prototypes", s.floats(5, 4)),
    lambda s: ("codebook", s.array(5, 4)),
    lambda s: ("buffers", [s.floats(3), s.floats(2)]),
    lambda s: ("nested", _blob(s)),
    lambda s: ("loss_weight", s.floats(9)),
    lambda s: ("stats_head", {"mean": s.floats(9), "std": s.floats(9)}),
    lambda s: ("object", Trainer(s.floats(3), {"x": s.floats(2)})),
    lambda s: ("tuple", (s.floats(3), {"y": s.floats(2)})),
    lambda s: ("sets", {0: s.floats(3), 1: {2: s.floats(3)}}),
    lambda s: ("objects", np.array([1, s.floats(3)], dtype=object)),
    lambda s: ("storage", s.floats(4)._typed_storage()),
    lambda s: ("time_embed", s.floats(4, 4)),
    lambda s: ("config_vectors", [s.floats(4)]),
)


@st.composite
def trees(draw: st.DrawFn, *, ordinary: bool | None = None) -> Tree:
    """Any checkpoint; `ordinary` narrows to those that must convert."""
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    source = Source(random.Random(draw(st.integers(0, 1 << 20))))
    is_ordinary = draw(st.booleans()) if ordinary is None else ordinary
    count = 1 if is_ordinary else draw(st.sampled_from([1, 1, 2, 3]))
    keys = draw(
        st.lists(
            st.sampled_from(PLAIN_MODEL_KEYS if is_ordinary else MODEL_KEYS),
            min_size=count,
            max_size=count,
            unique=True,
        )
    )
    value: dict[str, Any] = {}
    for key in keys:
        drawn = _modules if draw(st.integers(0, 3)) == 0 else _state_dicts
        value[key] = draw(drawn(source, ordinary=is_ordinary))
    if count == 1 and draw(st.integers(0, 4)) == 0:
        return Tree(value[keys[0]], ["."], is_ordinary)
    for index in draw(st.lists(st.integers(0, len(KNOWN) - 1), max_size=4)):
        key, beside = KNOWN[index](source, draw(st.integers(0, 30)))
        value.setdefault(key, beside)
    if not is_ordinary:
        for index in draw(st.lists(st.integers(0, len(UNKNOWN) - 1), max_size=1)):
            key, beside = UNKNOWN[index](source)
            value.setdefault(key, beside)
    order = draw(st.permutations(sorted(value)))
    value = {key: value[key] for key in order}
    return _wrapped(draw(st.integers(0, 11)), value, keys, is_ordinary)


def _wrapped(how: int, value: dict[str, Any], keys: list[str], ordinary: bool) -> Tree:
    if how == 0:
        return Tree({"checkpoint": value}, [f"checkpoint.{key}" for key in keys], ordinary)
    if how == 1:
        return Tree(OrderedDict(value), keys, ordinary)
    if how == 2:
        return Tree([value, {"epoch": 3}], [f"0.{key}" for key in keys], ordinary)
    if how in (3, 4, 5) and not ordinary:
        first = value.pop(keys[0])
        made = (Pair, Trainer, Slots)[how - 3](first, value)
        return Tree(made, ["model", *(f"rest.{key}" for key in keys[1:])], ordinary)
    if how == 6 and not ordinary:
        return Tree(UserDict(value), keys, ordinary)
    return Tree(value, keys, ordinary)
