# mypy: ignore-errors
"""Models of the kinds that loading can get wrong: what a user has, imported by restore's processes.

`trained_X` is the model whose weights are saved, `X` what builds the one to load them into; without the
former, the latter after a few steps of training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

WIDTH = 6


def inputs() -> tuple[torch.Tensor]:
    return (torch.linspace(-2, 2, 4 * WIDTH).reshape(4, WIDTH),)


def tokens() -> tuple[torch.Tensor]:
    return (torch.arange(4),)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, WIDTH)
        self.head = nn.Linear(WIDTH, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.embedding(tokens))


def tied() -> nn.Module:
    return Tied()


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.ones(9, WIDTH))


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))


def old_norm() -> nn.Module:
    return nn.Sequential(old_weight_norm(nn.Linear(WIDTH, WIDTH)))


def new_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))


def spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))).eval()


def orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(WIDTH), nn.ReLU(), nn.LazyLinear(3))


def trained_lazy() -> nn.Module:
    model = lazy()
    model(*inputs())
    return model


class Versioned(nn.Module):
    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if (metadata.get("version") or 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 10
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


def versioned() -> nn.Module:
    return nn.Sequential(Versioned())


class Hooked(nn.Module):
    """Saves under an old name, and takes it back by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.register_state_dict_post_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._rename_back)

    @staticmethod
    def _rename(module: nn.Module, state_dict: Any, prefix: str, metadata: Any) -> None:
        del module, metadata
        for name in ("weight", "bias"):
            state_dict[f"{prefix}old.{name}"] = state_dict.pop(f"{prefix}body.{name}")

    @staticmethod
    def _rename_back(module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
        del module, rest
        for name in ("weight", "bias"):
            state_dict[f"{prefix}body.{name}"] = state_dict.pop(f"{prefix}old.{name}")

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


def hooked() -> nn.Module:
    return Hooked()


def _twice(module: nn.Module, keys: Any) -> None:
    del keys
    module.weight.data.mul_(2)  # type: ignore[operator, union-attr]


def doubling() -> nn.Module:
    """Changes the weights that it was given, in their memory."""
    model = nn.Linear(4, 2)
    model.register_load_state_dict_post_hook(_twice)  # type: ignore[no-untyped-call]
    return model


class Halved(nn.Module):
    """Its parameters are views of one tensor of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(2, 4))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if (both := state_dict.pop(f"{prefix}both", None)) is not None:
            state_dict[f"{prefix}first"], state_dict[f"{prefix}second"] = both.chunk(2)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def halved() -> nn.Module:
    return Halved()


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.scale = 1.0

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": self.scale, "table": torch.full((2,), self.scale)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.scale = state["scale"]

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x) * self.scale


def extra() -> nn.Module:
    return nn.Sequential(Extra())


def trained_extra() -> nn.Module:
    model = extra()
    model[0].scale = 7.0
    return model


class Recurrent(nn.Module):
    """An LSTM keeps its parameters in a list as well, with weak references to them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.lstm(x)[0]


def recurrent() -> nn.Module:
    return Recurrent()


class Aliased(nn.Module):
    """Refers to a parameter by a plain attribute and in a list, and marks one as sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.body.weight.mark = "sharded"
        self.alias = [self.body.weight]
        self.__dict__["direct"] = self.body.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.alias[0].T + self.direct


def aliased() -> nn.Module:
    return Aliased()


def aliased_on_meta() -> nn.Module:
    with torch.device("meta"):
        return Aliased()


class Sharing(nn.Module):
    """Two buffers that are views of one storage."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.zeros(2 * WIDTH)
        self.register_buffer("first", both[:WIDTH])
        self.register_buffer("second", both[WIDTH:])

    def forward(self, x: torch.Tensor) -> Any:
        return x * self.first + self.second


def sharing() -> nn.Module:
    return Sharing()


def trained_sharing() -> nn.Module:
    model = Sharing()
    model.first.fill_(3.0)
    model.second.fill_(4.0)
    return model


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("angles", torch.arange(float(WIDTH)), persistent=False)
        self.plain = torch.full((WIDTH,), 2.0)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x) * self.angles + self.plain


def rotary() -> nn.Module:
    return Rotary()


def rotary_on_meta() -> nn.Module:
    with torch.device("meta"):
        return Rotary()


def norm_on_meta() -> nn.Module:
    with torch.device("meta"):
        return norm()


def tied_on_meta() -> nn.Module:
    with torch.device("meta"):
        return Tied()


def trained_halves() -> nn.Module:
    return norm().bfloat16()


def halves() -> nn.Module:
    return norm()


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two = self.one

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(self.one(x))


def shared() -> nn.Module:
    return Shared()


def frozen() -> nn.Module:
    model = norm()
    model[0].weight.requires_grad_(False)
    return model


def parallel() -> nn.Module:
    return nn.DataParallel(norm())


def compiled() -> nn.Module:
    return torch.compile(norm())


class Counting(nn.Module):
    """Its forward changes a buffer, and a parameter if asked to."""

    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        self.eager = eager
        self.body = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        if self.eager:
            with torch.no_grad():
                self.body.bias += 1
        return self.body(x)


def counting() -> nn.Module:
    return Counting()


def eager() -> nn.Module:
    return Counting(eager=True)


class Lying(nn.Module):
    """Answers differently once it is a program: what depends on Python's state is frozen by tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x) * (2.0 if torch.jit.is_tracing() else 1.0)


def lying() -> nn.Module:
    return Lying()


def with_lambda() -> nn.Module:
    model = norm()
    model.act = lambda x: x
    return model


def local_class() -> nn.Module:
    class Local(nn.Linear):
        pass

    return nn.Sequential(Local(WIDTH, WIDTH))


class Bigger(nn.Module):
    """`norm` with a head that its weights do not have, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = norm()
        self.head = nn.Linear(WIDTH, 2)


def bigger() -> nn.Module:
    return Bigger()


def quantized() -> nn.Module:
    net = nn.Sequential(nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH))
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
