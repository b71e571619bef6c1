"""`torch.distributed.checkpoint` folders, and a way from a place in one to a tensor without ptbin."""

from __future__ import annotations

import math
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ptbin
from ptbin.options import Limits
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.pickle.verdicts import judge_programs
from ptbin.reading.selected import Selected, select_from
from ptbin.sources.opening import find_source
from ptbin.stores.joined import PART_BITS, JoinedReader
from ptbin.values.nodes import DictNode
from ptbin.values.state_dict import StateDict
from ptbin.values.tensors import ByteRange, InMemory, Joined, TensorRef, Tiled
from tests.checkpoints.distributed import make_distributed
from tests.once import made_for_all

# What the processes write, and the path of the model in it.
FOLDERS = {
    "app": "app.model",
    "async": "model",
    "fsdp1": "model",
    "fsdp2": "model",
    "fsdp_and_tensor_parallel": ".",
    "lightning": "model",
    "mesh": "model",
    "tensor_parallel": "model",
    "tensor_parallel_4": "model",
    "torchtitan": "model",
}


@pytest.fixture(scope="session")
def dcp_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those folders, which several processes have written."""
    made = made_for_all(tmp_path_factory, "distributed", make_distributed)
    return {path.name: path for path in made.iterdir() if path.is_dir()}


class Files:
    """The bytes of a folder, by the offsets of ptbin's one address space."""

    def __init__(self, reader: JoinedReader, folder: Path) -> None:
        self._names = reader.names
        self._folder = folder

    def read(self, place: ByteRange | InMemory) -> bytes:
        if isinstance(place, InMemory):
            return place.data
        name = self._names[place.offset >> PART_BITS]
        with (self._folder / name).open("rb") as file:
            file.seek(place.offset & ((1 << PART_BITS) - 1))
            data = file.read(place.nbytes)
        assert len(data) == place.nbytes
        assert place.crc32 is None or zlib.crc32(data) == place.crc32
        return data

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """The tensor in plain row-major order."""
        item = ref.dtype.itemsize
        cells = np.zeros(ref.shape, dtype=f"V{item}")
        place = ref.storage.place
        if isinstance(place, Tiled):
            assert place.shape == ref.shape
            filled = np.zeros(ref.shape, dtype=np.int64)
            for tile in place.tiles:
                box = tuple(slice(a, a + n) for a, n in zip(tile.start, tile.shape, strict=True))
                cells[box] = _strided(self.read(tile.place), item, tile.shape, tile.stride, tile.offset)
                filled[box] += 1
            assert (filled == 1).all()
        else:
            assert isinstance(place, (ByteRange, InMemory, Joined))
            parts = place.parts if isinstance(place, Joined) else (place,)
            data = b"".join(self.read(part) for part in parts)
            assert len(data) == place.nbytes == ref.storage.nbytes
            if ref.numel:
                cells = _strided(data, item, ref.shape, ref.stride, ref.storage_offset * item)
        flat = torch.frombuffer(
            bytearray(cells.tobytes() or b"\0" * item), dtype=getattr(torch, ref.dtype.name)
        )
        return flat[: math.prod(ref.shape)].reshape(ref.shape)


def _strided(
    data: bytes, item: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> np.ndarray[Any, Any]:
    return np.ndarray(shape, f"V{item}", data, offset, tuple(item * step for step in stride))


def read(folder: Path, limits: Limits | None = None) -> tuple[Checkpoint, Files]:
    with find_source(str(folder)).open() as reader:
        assert isinstance(reader, JoinedReader)
        checkpoint = read_checkpoint(reader, limits)
        assert checkpoint.container == "torch_dcp"
        return checkpoint, Files(reader, folder)


def selection(checkpoint: Checkpoint) -> Selected:
    return select_from(checkpoint, judge_programs(checkpoint.programs), ptbin.ConvertOptions())


def selected(checkpoint: Checkpoint) -> StateDict:
    return selection(checkpoint).state_dict


def left_out(checkpoint: Checkpoint) -> dict[str, int]:
    return {item.path: item.nbytes for item in selection(checkpoint).accounting.left_out}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint, files = read(folder)
    entries = selected(checkpoint).entries
    return {name: files.tensor(value) for name, value in entries if isinstance(value, TensorRef)}


def by_torch(folder: Path, work: Path) -> Any:
    target = work / "oracle.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, target)
    return torch.load(target, weights_only=False)


def at(root: Any, path: str) -> Any:
    for step in [] if path == "." else path.split("."):
        root = root.get(step) if isinstance(root, DictNode) else root[step]
    return root


# -- layouts that one process can write -------------------------------------------------------------


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    return {
        "conv.weight": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conv.bias": torch.randn(3, dtype=torch.float64),
        "fp8": torch.randn(6).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(5).to(torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "slice": torch.arange(100.0)[10:20:2],
        "scalar": torch.tensor(2, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }


def moments() -> dict[str, Any]:
    return {"state": {"conv.bias": {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
