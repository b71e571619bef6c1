"""docs/containers.md, cell by cell: a tied model in each container, through each output, and back."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ptbin
from ptbin import ConvertOptions
from tests.bits import assert_same_tensors
from tests.checkpoints.archives import saved_bytes, tar_bytes, zip_bytes
from tests.checkpoints.deepspeed_zero import by_hand
from tests.checkpoints.distributed import save_alone

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (Path(__file__).parents[2] / "docs" / "containers.md").read_text(encoding="utf-8")
OUTPUTS: dict[str, dict[str, Any]] = {
    "torch": {},
    "raw": {"format": "raw"},
    "safetensors": {"format": "safetensors"},
    "torch, sharded": {"max_shard_size": 400},
    "safetensors, sharded": {"format": "safetensors", "max_shard_size": 400},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.body(self.embedding(tokens)))
        return hidden


def _model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def _saved(path: Path, content: Any, **arguments: Any) -> Path:
    torch.save(content, path, **arguments)
    return path


def _converted(path: Path, **options: Any) -> Path:
    source = _saved(path.with_suffix(".source"), _model().state_dict())
    ptbin.convert(str(source), str(path), ConvertOptions(**options))
    return path if path.exists() else path.with_name(path.name + ".index.json")


def _scripted(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(_model()), folder / "x.pt")
    return folder / "x.pt"


def _exported(folder: Path) -> Path:
    program = torch.export.export(_model(), (torch.arange(3),))
    torch.export.save(program, folder / "x.pt2")
    return folder / "x.pt2"


def _archive(path: Path, pack: Callable[[dict[str, bytes]], bytes], member: str) -> Path:
    path.write_bytes(pack({"about.txt": b"x" * 700, member: saved_bytes(_model().state_dict())}))
    return path


def _zero(folder: Path, stage: int) -> Path:
    own = {name: tensor.clone() for name, tensor in _model().state_dict().items()}
    shared = {"head.weight": "embedding.weight"}
    group = {name: tensor for name, tensor in own.items() if name not in shared}
    return by_hand(folder, [group], stage=stage, world_size=3, shared=shared)


CONTAINERS: dict[str, Callable[[Path], Path]] = {
    "torch zip": lambda folder: _saved(folder / "x.pt", _model().state_dict()),
    "torch legacy": lambda folder: _saved(
        folder / "x.pt", _model().state_dict(), _use_new_zipfile_serialization=False
    ),
    "TorchScript": _scripted,
    "whole module": lambda folder: _saved(folder / "x.pt", _model()),
    "training dict": lambda folder: _saved(
        folder / "x.ckpt",
        {"model": _model().state_dict(), "optimizer": {"state": {}, "param_groups": []}, "epoch": 3},
    ),
    "torch.export": _exported,
    "safetensors": lambda folder: _converted(folder / "x.safetensors", format="safetensors"),
    "raw": lambda folder: _converted(folder / "x.bin", format="raw"),
    "Hugging Face shards, bin": lambda folder: _converted(folder / "x.bin", max_shard_size=400),
    "Hugging Face shards, safetensors": lambda folder: _converted(
        folder / "x.safetensors", format="safetensors", max_shard_size=400
    ),
    "torch.distributed.checkpoint": lambda folder: save_alone(
        folder / "dcp", {"model": dict(copy.copy(_model().state_dict()))}
    ),
    "NeMo's `.nemo`, any plain tar": lambda folder: _archive(
        folder / "x.nemo", tar_bytes, "model_weights.ckpt"
    ),
    "stable-baselines3 `.zip`": lambda folder: _archive(folder / "x.zip", zip_bytes, "policy.pth"),
    "DeepSpeed ZeRO 2": lambda folder: _zero(folder, 2),
    "DeepSpeed ZeRO 3": lambda folder: _zero(folder, 3),
}


def _table() -> dict[tuple[str, str], str]:
    rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)]
    header, body = rows[0], rows[2:]
    width = len(header)
    body = body[: next(i for i, row in enumerate(body) if len(row) != width)]
    return {(row[0], output): cell for row in body for output, cell in zip(header[1:], row[1:], strict=True)}


def test_the_page_has_a_row_for_each_container_and_a_column_for_each_output() -> None:
    assert set(_table()) == {(container, output) for container in CONTAINERS for output in OUTPUTS}


@pytest.mark.parametrize(("cell", "kept"), _table().items(), ids=str)
def test_cell(cell: tuple[str, str], kept: str, tmp_path: Path) -> None:
    container, form = cell
    (tmp_path / "source").mkdir()
    source = CONTAINERS[container](tmp_path / "source")
    suffix = ".safetensors" if "safetensors" in form else ".bin"
    output = tmp_path / "out" / f"weights{suffix}"
    first = ptbin.convert(str(source), str(output), ConvertOptions(**OUTPUTS[form]))
    handle = output if output.exists() else output.with_name(output.name + ".index.json")
    # the splice that `ptbin restore` is; its processes are tested in test_restore.py
    second = ptbin.convert(str(handle), str(tmp_path / "back.pt"), ConvertOptions(verify="load"))
    loaded = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_tensors(loaded, _model().state_dict())
    tied = loaded["head.weight"].data_ptr() == loaded["embedding.weight"].data_ptr()
    assert tied == (kept == "tied")
    digests = [{row["name"]: row["sha256"] for row in manifest["tensors"]} for manifest in (first, second)]
    assert digests[0] == digests[1]
