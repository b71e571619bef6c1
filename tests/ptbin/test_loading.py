"""`ptbin.load`: arrays without a framework, mapped where they can be, read by ranges where they cannot."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import ptbin
from ptbin import ConvertOptions

STATE_DICT = {f"w{i}": torch.full((64, 1024), float(i)) for i in range(80)}
SHARDED: dict[str, Any] = {"max_shard_size": 64 * 1024 * 4}


@pytest.fixture
def source(tmp_path: Path) -> str:
    torch.save(STATE_DICT, tmp_path / "x.pt")
    return str(tmp_path / "x.pt")


@pytest.mark.parametrize("form", ["torch", "raw", "safetensors"])
def test_local_arrays_are_views_of_the_file(form: Any, source: str, tmp_path: Path) -> None:
    output = str(tmp_path / "x.bin")
    ptbin.convert(source, output, ConvertOptions(format=form))
    with ptbin.load(output) as weights:
        arrays = {name: weights[name] for name in weights}
    gc.collect()
    for name, tensor in STATE_DICT.items():  # after the weights were closed
        assert not arrays[name].flags.owndata
        assert not arrays[name].flags.writeable
        assert (arrays[name] == tensor.numpy()).all()


def test_more_shards_than_may_be_open_at_once(source: str, tmp_path: Path) -> None:
    ptbin.convert(source, str(tmp_path / "x.bin"), ConvertOptions(**SHARDED))
    with ptbin.load(str(tmp_path / "x.bin.index.json")) as weights:
        for _ in range(2):
            for name, tensor in STATE_DICT.items():
                assert (weights[name] == tensor.numpy()).all(), name


def test_only_what_is_asked_for_is_read(source: str) -> None:
    ptbin.convert(source, "memory://loading/x.bin")
    with ptbin.load("memory://loading/x.bin") as weights:
        before = weights._reader.bytes_read
        assert weights["w7"][0, 0] == 7
        assert weights._reader.bytes_read - before == STATE_DICT["w7"].nbytes
        assert weights.shape("w8") == (64, 1024)
        assert weights._reader.bytes_read - before == STATE_DICT["w7"].nbytes
    fsspec.filesystem("memory").rm("loading", recursive=True)


def test_no_framework_is_imported(source: str, tmp_path: Path) -> None:
    ptbin.convert(source, str(tmp_path / "x.bin"))
    script = (
        "import sys, ptbin; w = ptbin.load(sys.argv[1]); w['w3'].sum(); "
        "sys.exit(bool({'torch', 'prefect', 'fsspec'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.bin")], check=True)
