"""The examples run as they stand, and do what their page says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ptbin
from tests.servers.prefect_home import prefect_template

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    model = {"0.weight": torch.full((4, 3), 2.5), "0.bias": torch.arange(4.0)}
    torch.save({"model": model, "optimizer": {"state": {}, "param_groups": []}}, checkpoints / "good.pt")
    (checkpoints / "cut.pt").write_bytes((checkpoints / "good.pt").read_bytes()[:300])
    return tmp_path


def run(example: str, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in os.environ if name not in {"PYTHONPATH", "PREFECT_API_URL"}}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / example), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=kept | more,
        check=False,
    )


def test_every_example_is_on_the_page() -> None:
    page = (EXAMPLES / "README.md").read_text()
    assert [path.name for path in sorted(EXAMPLES.glob("*.[pj]*")) if path.name not in page] == []


@pytest.mark.starts_processes
def test_a_folder_is_converted_and_its_weights_are_used(folder: Path) -> None:
    done = run("convert_folder.py", folder / "checkpoints", folder / "weights")
    assert done.returncode == 1
    assert f"new: {folder}/weights/good.bin.manifest.json" in done.stdout
    assert "cut.pt: corrupt_archive: " in done.stderr
    used = run("use_weights.py", folder / "weights" / "good.bin")
    assert used.stdout.splitlines() == ["0.weight: 4x3, mean 2.5", "0.bias: 4, mean 1.5"]


@pytest.mark.starts_servers
def test_a_flow_around_the_flow(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = folder / "home"
    home.mkdir()
    shutil.copyfile(prefect_template(tmp_path_factory), home / "prefect.db")
    own = {"PREFECT_HOME": str(home), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "200"}
    done = run("nightly_flow.py", folder / "checkpoints", folder / "weights", **own)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "new: 1"
    assert "cut.pt (corrupt_archive)" in done.stdout + done.stderr


def test_fused_attention_is_cut(tmp_path: Path) -> None:
    fused = torch.randn(24, 8)
    torch.save({"blocks.0.qkv.weight": fused, "norm.weight": torch.ones(8)}, tmp_path / "x.pt")
    options = ptbin.ConvertOptions(recipe=(EXAMPLES / "split_qkv.json").read_text())
    ptbin.convert(tmp_path / "x.pt", tmp_path / "x.bin", options)
    cut = torch.load(tmp_path / "x.bin")
    assert list(cut) == [*(f"blocks.0.{name}_proj.weight" for name in "qkv"), "norm.weight"]
    for name, rows in zip("qkv", fused.chunk(3), strict=True):
        assert torch.equal(cut[f"blocks.0.{name}_proj.weight"], rows)
