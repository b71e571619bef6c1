"""Checkpoints in parts on other stores, and parts that are not of one save: one table over all layouts."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ptbin
from ptbin.errors import CheckpointError, CorruptArchiveError, IncompleteCheckpointError
from tests.bits import assert_same_tensors
from tests.checkpoints.deepspeed_slices import write_layers, write_ranks, write_universal, write_zero_ranks
from tests.checkpoints.hf_shards import NAME, write_shards
from tests.checkpoints.llama import write_meta_parts
from tests.checkpoints.megatron_files import Grid, Model, whole
from tests.checkpoints.megatron_files import write_ranks as write_megatron
from tests.checkpoints.old_meshes import Cut, save_as_old_torch
from tests.checkpoints.parts import write_experts
from tests.servers.endpoint import S3Endpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def _rank_files(folder: Path) -> None:
    folder.mkdir()
    value = torch.randn(5, 3)
    for rank in range(2):
        cut = Cut(value.chunk(2)[rank].clone(), (5, 3), (2,), (rank,), (0,))
        path = folder / f"model_world_size_2_rank_{rank}.pt"
        save_as_old_torch(path, {"w": cut, "buffer": torch.arange(3)}, "2.9")


def _layers(folder: Path) -> None:
    layers = {0: {"weight": torch.randn(4, 2)}, 1: {"weight": torch.randn(3, 2)}}
    write_layers(folder, layers, 1, optimizer={"state": {}, "param_groups": [{"params": [0, 1]}]})


def _megatron(folder: Path) -> None:
    write_megatron(folder, Model(), whole(Model()), Grid(2, 2))


LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "rank files": _rank_files,
    "hugging face shards": lambda folder: write_shards(
        folder, {"norm.weight": torch.randn(5), "up.weight": torch.randn(7, 5)}, 3
    ),
    "zero": lambda folder: write_zero_ranks(folder, 2, stage=1, world_size=2),
    "tensor-parallel ranks": lambda folder: write_ranks(folder, 3),
    "layers": _layers,
    "experts": write_experts,
    "universal": lambda folder: write_universal(folder, stage=1),
    "meta": lambda folder: write_meta_parts(folder, 2),
    "megatron": _megatron,
}
"""Name to what writes a whole checkpoint."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bytes_from_a_bucket(
    tmp_path: Path, moto_s3: S3Endpoint, layout: str
) -> None:
    LAYOUTS[layout](tmp_path / "run")
    source = next(iter((tmp_path / "run").glob("global_step*")), tmp_path / "run")
    ptbin.convert(str(source), str(tmp_path / "local.bin"))
    bucket, options = moto_s3.make_bucket(), moto_s3.storage_options
    for path in source.rglob("*"):
        if path.is_file():
            key = f"{bucket}/in/run/{path.relative_to(source)}"
            moto_s3.store().write_bytes(key, path.read_bytes())
    dest = f"s3://{bucket}/out/x.bin"
    ptbin.convert(f"s3://{bucket}/in/run", dest, source_options=options, dest_options=options)
    assert moto_s3.store().read_bytes(f"{bucket}/out/x.bin") == (tmp_path / "local.bin").read_bytes()


def test_rows_of_megatrons_ranks_are_copied_inside_the_store(tmp_path: Path, moto_s3: S3Endpoint) -> None:
    big = torch.arange(4 * 1024 * 1024, dtype=torch.float32).reshape(2048, 2048)
    wide = torch.randn(3, 8)
    bucket, options = moto_s3.make_bucket(), moto_s3.storage_options
    for rank in range(2):
        model = {
            "decoder.layers.0.self_attention.linear_q_proj.weight": big.chunk(2)[rank].clone(),
            "decoder.layers.0.self_attention.linear_proj.weight": wide.chunk(2, 1)[rank].clone(),
        }
        args = argparse.Namespace(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=1, num_layers=1, swiglu=False
        )
        data = io.BytesIO()
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": model}, data)
        name = f"{bucket}/in/iter_0000001/mp_rank_{rank:02d}/model_optim_rng.pt"
        moto_s3.store().write_bytes(name, data.getvalue())
    source, dest = f"s3://{bucket}/in/iter_0000001", f"s3://{bucket}/out/x.bin"
    manifest = ptbin.convert(source, dest, source_options=options, dest_options=options)
    found = torch.load(io.BytesIO(moto_s3.store().read_bytes(f"{bucket}/out/x.bin")), weights_only=True)
    prefix = "decoder.layers.0.self_attention"
    assert_same_tensors(found, {f"{prefix}.linear_q_proj.weight": big, f"{prefix}.linear_proj.weight": wide})
    assert manifest["bytes_copied_in_store"] >= big.nbytes // 2


_NOT_READ = ("*_optim_states.pt", "exp_avg*.pt", "optimizer_state.pt", "step.pt", "params.json")
"""Without which the weights are whole."""


def _weights(layout: str, source: Path) -> list[Path]:
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    return [
        path
        for path in files
        if (layout == "zero" and path.name.endswith("_optim_states.pt"))
        or not any(fnmatch(path.name, pattern) for pattern in _NOT_READ)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whichever_file_is_missing_or_cut_short_is_named(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path / "run")
    source = next(iter((tmp_path / "run").glob("global_step*")), tmp_path / "run")
    for path in _weights(layout, source):
        content, named = path.read_bytes(), str(path.relative_to(source))
        path.write_bytes(content[:-40])
        with pytest.raises(CorruptArchiveError) as caught:
            ptbin.convert(str(source), str(tmp_path / "x.bin"))
        assert named in str(caught.value)
        path.unlink()
        with pytest.raises(IncompleteCheckpointError) as missed:
            ptbin.convert(str(source), str(tmp_path / "x.bin"))
        assert named in str(missed.value), (layout, named)
        path.write_bytes(content)
    ptbin.convert(str(source), str(tmp_path / "x.bin"))


# -- Hugging Face shards: no counter says of which step they are ------------------------------------------


def _of_a_longer_model(folder: Path) -> None:
    other = folder.parent / "other"
    write_shards(other, {"norm.weight": torch.randn(5), "up.weight": torch.randn(11, 5)}, 3)
    (other / NAME.format(2)).replace(folder / NAME.format(2))


def _of_another_type(folder: Path) -> None:
    path = folder / NAME.format(2)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, told)


@pytest.mark.parametrize("damage", [_of_a_longer_model, _of_another_type])
def test_a_shard_of_another_save_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    LAYOUTS["hugging face shards"](tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(CheckpointError, match=NAME.format(2)) as caught:
        ptbin.convert(str(tmp_path / "run"), str(tmp_path / "x.bin"))
    assert isinstance(caught.value, IncompleteCheckpointError)
