"""Casts, gathers, copies and shards made by several threads: the output is what one thread makes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ptbin
from ptbin.errors import ChecksumMismatchError
from ptbin.options import ConvertOptions
from ptbin.proof.verification import verify
from ptbin.splice import parallel_pieces
from ptbin.stores.local_writer import LocalWriter


@pytest.fixture(params=["torch", "safetensors"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {f"layers.{i}.weight": torch.randn(300 + i, 200, generator=generator) for i in range(12)}
    state["huge"] = torch.full((1000,), 1e39, dtype=torch.float64)
    if request.param == "safetensors":
        save_file(state, tmp_path / "source.safetensors")
        return tmp_path / "source.safetensors"
    state["view"] = torch.randn(200, 500, generator=generator).t()
    torch.save(state, tmp_path / "source.pt")
    return tmp_path / "source.pt"


def threads(monkeypatch: pytest.MonkeyPatch, count: int) -> set[str]:
    """Let so many cores be spare; the names of the threads that wrote at places of their own."""
    used: set[str] = set()
    real = LocalWriter.write_at

    def write_at(self: LocalWriter, *arguments: Any) -> None:
        used.add(threading.current_thread().name)
        real(self, *arguments)

    monkeypatch.setattr(LocalWriter, "write_at", write_at)
    monkeypatch.setattr(parallel_pieces, "spare_cores", lambda: count)
    monkeypatch.setattr(parallel_pieces, "MIN_NBYTES", 1 << 16)  # small ones are written in runs
    return used


@pytest.mark.parametrize("wishes", [{}, {"dtype": "bfloat16"}, {"format": "raw"}], ids=str)
def test_the_output_is_the_same(
    wishes: dict[str, Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = "raw" if "format" in wishes else "bin"
    made = {}
    for count in (1, 4):
        with monkeypatch.context() as patch:
            used = threads(patch, count)
            out = tmp_path / str(count) / f"out.{suffix}"
            manifest = ptbin.convert(str(source), str(out), ConvertOptions(**wishes))
            assert len(used) <= count
            moved = source.suffix == ".pt" and "dtype" not in wishes  # by the kernel, as it is
            assert bool(used) == (count > 1 and not moved)
            made[count] = (out.read_bytes(), manifest["tensors"])
    assert made[1] == made[4]
    if "dtype" in wishes:
        (row,) = [row for row in made[4][1] if row["name"] == "huge"]
        assert row["overflowed"] == 1000


def test_damage_that_a_thread_finds_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.pt"
    torch.save({str(i): torch.randn(400, 300) for i in range(9)}, source)
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    source.write_bytes(data)
    before = threading.active_count()
    used = threads(monkeypatch, 4)
    with pytest.raises(ChecksumMismatchError):
        ptbin.convert(str(source), str(tmp_path / "out" / "out.bin"), ConvertOptions(dtype="float16"))
    assert used
    assert not (tmp_path / "out").exists()
    assert threading.active_count() <= before + 1  # the pool that hashes stays


# -- shards ------------------------------------------------------------------------------------------


def sharded(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> dict[str, bytes]:
    monkeypatch.setattr("ptbin.output_files.spare_cores", lambda: cores)
    ptbin.convert(str(source), str(out), ConvertOptions(max_shard_size=300_000, force=True))
    return {path.name: path.read_bytes() for path in out.parent.iterdir() if "manifest" not in path.name}


def test_shards_written_at_once_are_those_written_in_turn(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = [0]
    most = [0]

    class Counted(LocalWriter):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            at_once[0] += self._is_shard
            most[0] = max(most[0], at_once[0])

        def commit(self) -> None:
            super().commit()
            at_once[0] -= self._is_shard

        @property
        def _is_shard(self) -> bool:
            return self.uri.endswith(".bin")

    in_turn = sharded(source, tmp_path / "1" / "net.bin", monkeypatch, 1)
    monkeypatch.setattr("ptbin.stores.local.LocalWriter", Counted)
    together = sharded(source, tmp_path / "4" / "net.bin", monkeypatch, 4)
    assert len(in_turn) > 5
    assert together == in_turn
    assert 1 < most[0] <= 4
    assert verify(str(tmp_path / "4" / "net.bin.manifest.json")) == []


def test_one_damaged_shard_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.pt"
    torch.save({str(i): torch.randn(400, 300) for i in range(9)}, source)
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    source.write_bytes(data)
    with pytest.raises(ChecksumMismatchError):
        sharded(source, tmp_path / "out" / "net.bin", monkeypatch, 4)
    assert not list(tmp_path.rglob("*.manifest.json"))
    left = {thread.name for thread in threading.enumerate() if thread.name.startswith("ptbin-shard")}
    assert not left
