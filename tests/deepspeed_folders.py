"""DeepSpeed's folders laid out by hand, and an oracle's view of what was read of one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ptbin.options import Limits
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.containers.checkpoint import Checkpoint, as_checkpoint_errors
from ptbin.sources.opening import find_source
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import ByteRange, InMemory, Joined, TensorRef
from tests.checkpoints.deepspeed_zero import by_hand


def read(tag: Path, limits: Limits | None = None) -> Checkpoint:
    with find_source(str(tag)).open() as reader, as_checkpoint_errors(reader.uri):
        return read_checkpoint(reader, limits)


def _bytes_at(tag: Path, names: list[str], place: Any) -> bytes:
    """The bytes of a place, straight from the files: the upper bits of an offset number the file."""
    if isinstance(place, InMemory):
        return place.data
    if isinstance(place, Joined):
        return b"".join(_bytes_at(tag, names, part) for part in place.parts)
    assert isinstance(place, ByteRange)
    with (tag / names[place.offset >> 48]).open("rb") as file:
        file.seek(place.offset & ((1 << 48) - 1))
        return file.read(place.nbytes)


def tensors_in(checkpoint: Checkpoint, tag: Path, path: str = "fp32") -> dict[str, torch.Tensor]:
    """The tensors of one candidate, as torch tensors."""
    node = checkpoint.root.get(path)
    assert isinstance(node, DictNode)
    names = sorted(os.listdir(tag))
    found = {}
    for name, ref in node.by_name().items():
        assert isinstance(ref, TensorRef)
        raw = _bytes_at(tag, names, ref.storage.place)
        assert len(raw) == ref.storage.nbytes
        dtype = getattr(torch, ref.dtype.name)
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        found[name] = flat.as_strided(ref.shape, ref.stride, ref.storage_offset)
    return found


def bits(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).view(torch.float32)


GENERATOR = torch.Generator().manual_seed(11)


def randoms(*shape: int) -> torch.Tensor:
    """Any bits: NaNs with payloads, denormals, both zeros."""
    return (
        torch.randint(-(2**31), 2**31, shape, generator=GENERATOR, dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
        if shape
        else bits(0x7FA12345).reshape(())
    )


GROUPS: tuple[dict[str, torch.Tensor], ...] = (
    {"embedding": randoms(5, 7), "body.weight": randoms(3, 3, 2), "single": randoms()},
    {"body.bias": randoms(3), "scale": randoms(1)},
)
FROZEN = {
    "old.weight": torch.randn(4, 3).half(),
    "old.bias": torch.randn(3).bfloat16(),
    "void": torch.empty(0, 4),
}
BUFFERS = {
    "steps": torch.tensor(12),
    "table": torch.arange(6).reshape(2, 3).to(torch.int16),
    "mean": torch.randn(5),
    "mean16": torch.tensor([1.0, -0.0, float("inf"), 3e-5]).half(),
    "meanb": torch.tensor([0x7FC1, 0x0001, -32768, 0x7F81], dtype=torch.int16).view(torch.bfloat16),
    "mean64": torch.tensor([1e300, 1e-50, 0.1], dtype=torch.float64),
    "turned": torch.randn(3, 2).half().t(),
    "part": torch.randn(9).half()[4:7],
    "mask": torch.tensor([True, False]),
}
PADDINGS = [[5, 0, 3], [1, 2]]
SHARED = {"head": "embedding", "nowhere": "gone"}


def expected_of(groups: Any = GROUPS) -> dict[str, torch.Tensor]:
    expected = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in BUFFERS.items()
    }
    expected.update(FROZEN)
    for group in groups:
        expected.update(group)
    return {**expected, "head": groups[0]["embedding"]}


def folder_of(path: Path, stage: int, world_size: int, **more: Any) -> Path:
    return by_hand(
        path,
        more.pop("groups", GROUPS),
        stage=stage,
        world_size=world_size,
        frozen=FROZEN,
        buffers=BUFFERS,
        shared=SHARED,
        **more,
    )


def needs_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")


def with_model(**changes: Any) -> Any:
    """For `folder_of(change=...)`: other values in the files of the model."""

    def change(name: str, states: dict[str, Any]) -> None:
        if "model_states" in name:
            states.update(changes)

    return change


def with_flats(stage: int, replace: Any) -> Any:
    """For `folder_of(change=...)`: other partitions."""
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"

    def change(name: str, states: dict[str, Any]) -> None:
        if "optim" in name:
            states["optimizer_state_dict"][key] = replace(states["optimizer_state_dict"][key])

    return change
