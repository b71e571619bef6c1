"""Memory stays flat as the file grows, and nothing heavy is imported.

Measured as a user would: the peak resident set of a whole process that converts one file, proof
included. 100 MiB of weights more may cost 16 MiB more, and none more than 100 MiB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from tests.bits import same_bits
from tests.checkpoints.dtypes import random_bits

pytestmark = pytest.mark.starts_processes

ROOT = Path(ptbin.__file__).parents[1]
MIB = 1 << 20
SMALL, LARGE = 40 * MIB, 136 * MIB

# ru_maxrss of a fresh process starts at its parent's, which holds torch (Linux keeps it over fork and exec):
# VmHWM begins anew at exec.
_CONVERT = """
import json, sys
import ptbin
source, dest = sys.argv[1:]
manifest = ptbin.convert(source, dest)
assert manifest["verification"]["status"] == "verified"
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "peak": int(status["VmHWM"].split()[0]) * 1024,
    "heavy": sorted({"torch", "prefect", "fsspec", "pandas"} & set(sys.modules)),
    "numpy": "numpy" in sys.modules,
}))
"""


def _convert_apart(source: Path, dest: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, source, dest],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def _state(nbytes: int) -> dict[str, torch.Tensor]:
    """Tensors of 8 MiB, and one that is half of everything."""
    half = nbytes // 2
    parts = {f"w{i}": random_bits(torch.float32, (2 * MIB,), seed=i) for i in range(half // (8 * MIB))}
    return {**parts, "large": random_bits(torch.float32, (half // 4096, 1024), seed=99)}


def _torch_zip(path: Path, nbytes: int) -> None:
    torch.save({"optimizer": {"m": torch.ones(1000)}, "model": _state(nbytes)}, path)


def _legacy(path: Path, nbytes: int) -> None:
    torch.save(_state(nbytes), path, _use_new_zipfile_serialization=False)


def _crc_off(path: Path, nbytes: int) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        _torch_zip(path, nbytes)
    finally:
        torch.serialization.set_crc32_options(True)


def _transposed(path: Path, nbytes: int) -> None:
    """Every element of a column lies in another row."""
    torch.save({"t": random_bits(torch.float32, (nbytes // 8192, 2048)).t()}, path)


def _permuted(path: Path, nbytes: int) -> None:
    rows = nbytes // (4 * 64 * 512)
    torch.save({"p": random_bits(torch.float32, (rows, 64, 512)).permute(1, 0, 2)}, path)


def _sliced(path: Path, nbytes: int) -> None:
    """Every second column of a matrix: half of a storage, in holes too small to skip."""
    torch.save({"s": random_bits(torch.float32, (nbytes // 4096, 1024))[:, ::2]}, path)


@pytest.mark.parametrize(
    "write",
    [_torch_zip, _legacy, _crc_off, _sliced, _transposed, _permuted],
)
def test_memory_does_not_grow_with_the_file(write: Callable[[Path, int], None], tmp_path: Path) -> None:
    peaks = {}
    for nbytes in (SMALL, LARGE):
        source, dest = tmp_path / "model.pt", tmp_path / "model.bin"
        write(source, nbytes)
        seen = _convert_apart(source, dest)
        assert seen["heavy"] == []
        assert seen["numpy"] in (False, write in (_transposed, _permuted, _sliced))
        peaks[nbytes] = seen["peak"] / MIB
        _same_as_torch(source, dest)
    assert peaks[LARGE] < 100, peaks
    assert peaks[LARGE] - peaks[SMALL] < 16, peaks


def _same_as_torch(source: Path, dest: Path) -> None:
    loaded: Mapping[str, Any] = torch.load(source, weights_only=True, mmap=_maps(source))
    expected = loaded.get("model", loaded)
    found = torch.load(dest, weights_only=True, mmap=True)
    assert list(found) == list(expected)
    assert all(same_bits(found[name], expected[name]) for name in expected)


def _maps(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def test_a_small_conversion_imports_next_to_nothing(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "model.pt")
    seen = _convert_apart(tmp_path / "model.pt", tmp_path / "model.bin")
    assert seen["heavy"] == []
    assert not seen["numpy"]
    assert seen["peak"] < 40 * MIB


@pytest.mark.slow
def test_a_checkpoint_beyond_4_gib(tmp_path: Path) -> None:
    """One storage beyond 4 GiB, others whose headers stand behind that offset; zip64."""
    big = torch.zeros((4 << 30) + 4096, dtype=torch.uint8)
    for place in (0, 123_456_789, (4 << 30) + 4095):
        big[place] = 77
    state = {
        "first": random_bits(torch.float32, (1000,)),
        "big": big,
        "last": random_bits(torch.int64, (500,)),
    }
    source, dest = tmp_path / "model.pt", tmp_path / "model.bin"
    torch.save({"model": state, "optimizer": {"m": random_bits(torch.float32, (300,), seed=5)}}, source)
    del big
    seen = _convert_apart(source, dest)
    assert seen["peak"] < 100 * MIB
    for mmap in (False, True):
        loaded = torch.load(dest, weights_only=True, mmap=mmap)
        assert list(loaded) == list(state)
        for name, tensor in state.items():
            assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
    assert ptbin.verify(f"{dest}.manifest.json") == []
