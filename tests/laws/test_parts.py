"""The law over checkpoints in parts: every storage of every file is taken, or left out by a role, or stops
it.

Folders of all kinds, with something drawn put into one of their files. Files that are not opened are counted
by
their sizes. What is computed (a buffer cast to float32) is counted as well, and is not in here.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import ptbin
from ptbin.errors import PtbinError
from tests.checkpoints.cut_ranks import cut_ranks
from tests.checkpoints.deepspeed_slices import (
    rank_model,
    write_layers,
    write_ranks,
    write_universal,
    write_zero_ranks,
)
from tests.checkpoints.deepspeed_zero import by_hand
from tests.checkpoints.hf_shards import write_shards
from tests.checkpoints.llama import write_meta_parts
from tests.checkpoints.megatron_files import Grid, Model, whole
from tests.checkpoints.megatron_files import write_ranks as write_megatron
from tests.checkpoints.parts import write_experts
from tests.laws.law import SOUND_REASONS, Holdings

EXAMPLES = int(os.environ.get("PTBIN_LAW_EXAMPLES", "0"))
pytestmark = pytest.mark.filterwarnings("ignore")


def _zero(folder: Path, stage: int) -> None:
    model = rank_model()
    by_hand(folder, [model], stage=stage, world_size=2, buffers={"mean": torch.randn(3)})


def _layers(folder: Path) -> None:
    model = {n: t for n, t in rank_model().items() if n in ("norm.weight", "up.bias")}
    layers = {0: {"a": torch.randn(4)}, 1: model, 2: model}
    groups = [{"params": [0, 1, 2]}, {"params": [3, 4]}]
    write_layers(folder, layers, 1, optimizer={"state": {}, "param_groups": groups})


def _rank_files(folder: Path) -> None:
    """HSDP, FSDP over tensor parallelism, uneven and empty pieces, a buffer that all ranks have."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    tensors: dict[str, tuple[torch.Tensor, list[Any]]] = {
        "hsdp.weight": (torch.randn(3, 2), [Replicate(), Shard(0)]),
        "both.weight": (torch.randn(9, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
        "columns.weight": (torch.randn(2, 5), [Shard(1), Replicate()]),
        "one.bias": (torch.randn(1), [Shard(0), Shard(0)]),
    }
    cut_ranks(folder, (2, 2), tensors, steps=torch.arange(3))


def _megatron(folder: Path) -> None:
    model = Model(layers=2, experts=2, kind="grouped", tied=True)
    write_megatron(folder, model, whole(model), Grid(2, 2, expert=2, expert_tensor=1, counts=(1, 1)))


def _shards(folder: Path) -> None:
    write_shards(folder, {"norm.weight": torch.randn(5), "up.weight": torch.randn(7, 5)}, 3)


KINDS: dict[str, Callable[[Path], Any]] = {
    "zero 2": lambda folder: _zero(folder, 2),
    "zero 3": lambda folder: _zero(folder, 3),
    "zero 1 of two tensor-parallel ranks": lambda folder: write_zero_ranks(folder, 2, stage=1, world_size=2),
    "tensor-parallel ranks": lambda folder: write_ranks(folder, 2),
    "layers": _layers,
    "experts": write_experts,
    "universal": lambda folder: write_universal(folder, stage=1),
    "meta": lambda folder: write_meta_parts(folder, 2),
    "rank files": _rank_files,
    "megatron": _megatron,
    "hugging face shards": _shards,
}
"""Name to what writes one checkpoint below a folder."""

EXTRAS: dict[str, Callable[[], Any]] = {
    "array": lambda: np.arange(7.0),
    "arrays": lambda: {"a": np.arange(5), "b": [np.ones((2, 3), np.float32)]},
    "a single number": lambda: np.float64(3.5),
    "optimizer": lambda: {
        "state": {0: {"exp_avg": torch.randn(6), "step": torch.tensor(3.0)}},
        "param_groups": [],
    },
    "generators": lambda: {"torch": torch.randint(0, 255, (16,), dtype=torch.uint8), "numpy": np.arange(624)},
    "tensor": lambda: torch.randn(4),
    "a view": lambda: torch.randn(9)[2:5],
    "nested": lambda: {"deep": [{"er": torch.randn(2)}, "text", None]},
}


def _is_unopened(path: Path, kind: str) -> bool:
    if path.name.endswith("_optim_states.pt"):
        return not kind.startswith("zero")
    return path.name in ("exp_avg.pt", "exp_avg_sq.pt", "optimizer_state.pt")


def _content(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)


@pytest.mark.thorough
@settings(
    deadline=None,
    max_examples=EXAMPLES or 60,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    extra=st.sampled_from(["", *sorted(EXTRAS)]),
    key=st.sampled_from(["rng_states", "extra", "lr_scheduler", "random_ltd", "ema", "optimizer_extra"]),
    seed=st.integers(0, 99),
)
def test_every_byte_of_every_part_is_taken_or_named_or_stops_it(
    kind: str, extra: str, key: str, seed: int
) -> None:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        KINDS[kind](folder)
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".safetensors"))
        opened = [path for path in files if not _is_unopened(path, kind)]
        if extra:
            path = random.Random(seed).choice(opened)
            content = _content(path)
            if isinstance(content, dict) and path.suffix != ".safetensors":
                torch.save({**content, key: EXTRAS[extra]()}, path)
        source = next(iter(folder.glob("global_step*")), folder)
        try:
            manifest = ptbin.convert(str(source), str(Path(name) / "out" / "x.bin"))
        except PtbinError as error:
            if not extra or error.reason not in SOUND_REASONS:
                raise
            event(f"{kind}: {error.reason}")
            return
        held = sum(Holdings.of(_content(path)).nbytes for path in opened)
        unread = sum(path.stat().st_size for path in files if path not in opened)
        accounting = manifest["accounting"]
        assert accounting["source_tensor_bytes"] == held + unread
        assert accounting["taken_bytes"] + sum(accounting["left_out"].values()) == held + unread
        assert ptbin.verify(str(Path(name) / "out" / "x.bin.manifest.json")) == []
        event(f"{kind}: taken")
