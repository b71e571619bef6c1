"""What a checkpoint of very many small tensors costs: reads, writes and steps by their number, never time."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pytest
import torch
from safetensors.torch import save_file

import ptbin
from ptbin.errors import AmbiguousStateDictError, ChecksumMismatchError
from ptbin.options import ConvertOptions
from ptbin.values.nodes import DictNode

TENSORS = 3000


@pytest.fixture(params=["pt", "safetensors"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"source.{request.param}"
    state = {f"layers.{i // 4}.part{i % 4}": torch.full((2 + i % 3,), float(i)) for i in range(TENSORS)}
    if request.param == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the process reads and writes files from now on."""
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            calls[name] += 1
            return real(*arguments, **more)

        monkeypatch.setattr(os, name, call)

    for name in ("pread", "preadv", "write", "pwrite", "copy_file_range"):
        count(name)
    return calls


@pytest.mark.parametrize("output_format", ["torch", "safetensors", "raw"])
def test_small_tensors_are_read_and_written_many_at_a_time(
    output_format: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / ("out.safetensors" if output_format == "safetensors" else "out.bin")
    with monkeypatch.context() as patch:
        calls = counted(patch)
        manifest = ptbin.convert(source, out, ConvertOptions(format=output_format))
    assert len(manifest["tensors"]) == TENSORS
    assert calls.total() < 60  # 12,000 and more, one by one


def test_a_damaged_one_among_them_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source.pt"
    torch.save({f"w{i}": torch.full((5,), float(i)) for i in range(200)}, source)
    data = bytearray(source.read_bytes())
    at = data.index(torch.full((5,), 77.0).numpy().tobytes())
    data[at] ^= 1
    source.write_bytes(data)
    for verify in ("none", "checksum"):
        with pytest.raises(ChecksumMismatchError, match="data/77"):
            ptbin.convert(
                source, tmp_path / "out.safetensors", ConvertOptions(verify=verify, format="safetensors")
            )
        assert not (tmp_path / "out.safetensors").exists()


class _Steps:
    """How many calls Python makes."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Self:
        sys.setprofile(self._count)
        return self

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self.count += 1

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)


def _views(count: int) -> dict[str, torch.Tensor]:
    """Views that are cut out of one storage."""
    flat = torch.arange(count * 4, dtype=torch.float32)
    return {f"v{i}": flat[i * 4 : i * 4 + 2] for i in range(count)}


def test_the_steps_grow_with_the_number_of_views_of_one_storage(tmp_path: Path) -> None:
    """Twice as many take twice as many calls, and a little: each gets a record with a name of its own."""
    counts = []
    for number in (500, 1000, 2000):
        source = tmp_path / f"{number}.pt"
        torch.save(_views(number), source)
        with _Steps() as steps:
            ptbin.convert(source, tmp_path / "out.bin", ConvertOptions(verify="none", force=True))
        counts.append(steps.count)
    first, second, third = counts
    assert third - second < 2.2 * (second - first)


def test_thousands_of_state_dicts_are_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing looks through the whole top level again for each of them."""
    source = tmp_path / "source.pt"
    torch.save({f"d{i}": {"weight": torch.ones(1), "bias": torch.ones(1)} for i in range(300)}, source)
    looks: Counter[int] = Counter()
    real = DictNode.get

    def get(self: DictNode, key: str, default: Any = None) -> Any:
        looks[len(self.pairs)] += 1
        return real(self, key, default)

    monkeypatch.setattr(DictNode, "get", get)
    with pytest.raises(AmbiguousStateDictError, match="300 state dicts"):
        ptbin.convert(source, tmp_path / "out.bin")
    assert looks[300] < 10
