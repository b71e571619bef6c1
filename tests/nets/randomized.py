# mypy: ignore-errors
"""A module made after a plan: what the property test restores, and what its processes build."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations

WIDTH = 4


class Extra(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.scale = 1.0

    def get_extra_state(self):
        return {"scale": self.scale, "kept": [1, (2, "x")]}

    def set_extra_state(self, state):
        self.scale = state["scale"]

    def forward(self, x):
        return super().forward(x) * self.scale


class Versioned(nn.Linear):
    _version = 3

    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def _load_from_state_dict(self, state_dict, prefix, metadata, *rest):
        if (metadata.get("version") or 1) < 3:
            state_dict[prefix + "bias"] = state_dict[prefix + "bias"] + 100
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_state_dict_post_hook(_rename)
        self.register_load_state_dict_pre_hook(_rename_back)

    def forward(self, x):
        return self.inner(x)


def _rename(module, state_dict, prefix, metadata):
    state_dict[f"{prefix}saved_as"] = state_dict.pop(f"{prefix}inner.weight")


def _rename_back(module, state_dict, prefix, *rest):
    state_dict[f"{prefix}inner.weight"] = state_dict.pop(f"{prefix}saved_as")


class Buffers(nn.Module):
    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("shift", torch.arange(float(WIDTH)), persistent=persistent)
        self.register_buffer("count", torch.tensor(3), persistent=True)

    def forward(self, x):
        return x + self.shift.to(x.dtype) + self.count


class Frozen(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.weight.requires_grad_(False)


BLOCKS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.BatchNorm1d(WIDTH),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "extra": Extra,
    "versioned": Versioned,
    "hooked": Hooked,
    "kept": lambda: Buffers(True),
    "dropped": lambda: Buffers(False),
    "frozen": Frozen,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
    "dropout": lambda: nn.Dropout(0.3),
}


def build(blocks, ties=(), dtype="float32", device="cpu", seed=0):
    """`ties`: pairs of numbers of blocks whose weights are one, where both have a plain one of that shape."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = nn.Sequential(*(BLOCKS[kind]() for kind in blocks))
        model = model.to(getattr(torch, dtype))
    for one, other in ties:
        if _tieable(model[one]) and _tieable(model[other]):
            model[other].weight = model[one].weight
    return model


def _tieable(block):
    return type(block) in {nn.Linear, Frozen, Extra, Versioned}


def trained(**plan):
    """After some training: every tensor differs from what `build` gives, with another seed and without."""
    model = build(**{**plan, "device": "cpu", "seed": 99})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
        for block in model:
            if isinstance(block, nn.BatchNorm1d):
                block.running_mean.add_(0.5)
                block.num_batches_tracked.add_(7)
            if isinstance(block, Extra):
                block.scale = 1.5
            if isinstance(block, Buffers):
                block.count.add_(2)
    return model


def inputs(dtype="float32"):
    return (torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH).to(getattr(torch, dtype)),)


def float32_inputs():
    return inputs()


def bfloat16_inputs():
    return inputs("bfloat16")


def float64_inputs():
    return inputs("float64")
