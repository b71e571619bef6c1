"""Checkpoints beside whose weights stand values that look dangerous and are not.

Protocol 2, which torch.save writes, has no dotted names: a nested class, an enum inside a class and a bound
method become calls of `getattr` (CPython, Lib/pickle.py, `save_global`; Objects/classobject.c).
"""

from __future__ import annotations

import enum
import functools
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.dtypes import random_state_dict
from tests.checkpoints.registry import Checkpoint, checkpoint


class Net(torch.nn.Module):
    @dataclass
    class Config:
        @dataclass
        class Inner:
            class Mode(enum.Enum):
                FAST = "fast"
                http = "http"

                def describe(self) -> str:
                    return self.value

            width: int = 3

        class Level(enum.IntFlag):
            LOW = 1
            HIGH = 2

        inner: Inner = field(default_factory=Inner)

        @classmethod
        def from_width(cls, width: int) -> Net.Config:
            return cls(cls.Inner(width))

    class Plain:
        def compile(self) -> None:
            """A method of a name that is dangerous elsewhere."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.linear(x)
            return result

    def __init__(self) -> None:
        super().__init__()
        self.block = Net.Block()
        self.config = Net.Config()

    def open(self) -> None:
        """A method of a name that is dangerous elsewhere."""


class Rebuilt:
    """An object that a class method of its own makes again."""

    @classmethod
    def make(cls, width: int) -> Rebuilt:
        return cls()

    def __reduce__(self) -> Any:
        return Rebuilt.make, (3,)


VALUES: dict[str, Callable[[], Any]] = {
    "nested_dataclass": Net.Config,
    "class_nested_twice": Net.Config.Inner,
    "class_itself": lambda: Net.Config.Inner,
    "enum_inside_a_class": lambda: Net.Config.Inner.Mode.FAST,
    "enum_member_named_like_a_module": lambda: Net.Config.Inner.Mode.http,
    "flag_inside_a_class": lambda: Net.Config.Level.LOW | Net.Config.Level.HIGH,
    "bound_class_method": lambda: Net.Config.from_width,
    "bound_method_of_an_enum_member": lambda: Net.Config.Inner.Mode.FAST.describe,
    "bound_method_named_compile": lambda: Net.Plain().compile,
    "method_named_open": lambda: Net.open,
    "partial_of_a_nested_class": lambda: functools.partial(Net.Config.Inner, width=5),
    "method_of_a_builtin": lambda: [str.lower, "x".upper, dict.fromkeys],
    "lookup_of_a_vocabulary": lambda: [{"a": 1}.__getitem__, [1, 2].__len__, defaultdict({}.__len__)],
    "object_made_by_its_class_method": Rebuilt,
}
"""Values that no careful reader calls unsafe."""


def _register(name: str, make: Callable[[], Any]) -> None:
    @checkpoint(name=f"beside_a_{name}", torch_reads="pickle")
    def build(path: Path) -> Checkpoint:
        state = random_state_dict()
        torch.save({"model": state, "config": {"value": make()}}, path)
        return Checkpoint(path, state)


for _name, _make in VALUES.items():
    _register(_name, _make)


@checkpoint(torch_reads="pickle")
def module_of_nested_classes(path: Path) -> Checkpoint:
    torch.manual_seed(0)
    net = Net()
    torch.save(net, path)
    return Checkpoint(path, net.state_dict())


@checkpoint(suffix=".pkl", torch_reads=None)
def module_of_nested_classes_in_protocol_0(path: Path) -> Checkpoint:
    torch.manual_seed(0)
    net = Net()
    buffer = io.BytesIO()
    pickle.dump(net, buffer, 0)
    path.write_bytes(buffer.getvalue())
    return Checkpoint(path, net.state_dict())
