"""Pickles that torch did not frame, numpy in the place of tensors, and files that hold no weights."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints.craft import TorchPickle, torch_members, write_zip
from tests.checkpoints.dtypes import random_bits, random_state_dict
from tests.checkpoints.registry import Checkpoint, checkpoint


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
    """A tensor whose storage is a legacy torch file of its own, inside the pickle of a zip."""
    tensor = random_bits(torch.float32, (3, 4))
    opcodes = pickle.dumps(tensor, protocol=3)[2:-1]
    write_zip(path, torch_members(TorchPickle.state_dict({"w": opcodes})))
    return Checkpoint(path, {"w": tensor})


@checkpoint(torch_reads="pickle")
def pickled_bytes_beside_weights(path: Path) -> Checkpoint:
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
