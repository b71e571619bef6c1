"""Tensors cut by any mesh come together again, as torch of today and of years ago cuts them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ptbin
from ptbin.errors import (
    CheckpointError,
    IncompleteCheckpointError,
    UnsupportedTensorError,
)
from ptbin.reading.pickle.placements import Interpretation, Placement, runs_of
from tests.bits import assert_same_tensors
from tests.checkpoints.cut_ranks import as_rank, cut_ranks
from tests.checkpoints.old_meshes import OLD_TORCHES, Cut, save_as_old_torch

pytestmark = pytest.mark.filterwarnings("ignore")


def _converted(source: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    ptbin.convert(str(source), str(tmp_path / "whole.bin"))
    found: dict[str, torch.Tensor] = torch.load(tmp_path / "whole.bin", weights_only=True)
    return found


def test_sixty_four_ranks_of_three_mesh_dimensions(tmp_path: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard

    tensors: dict[str, tuple[torch.Tensor, list[Any]]] = {
        "a": (torch.randn(67, 3), [Replicate(), Shard(0), Shard(0)]),
        "b": (torch.randn(5, 70), [Shard(1), Replicate(), Shard(0)]),
        "c": (torch.randn(3, 17, 9), [Shard(2), Shard(1), Shard(0)]),
    }
    folder = cut_ranks(tmp_path / "ranks", (4, 4, 4), tensors)
    assert_same_tensors(_converted(folder, tmp_path), {k: v for k, (v, _) in tensors.items()})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_tensor_cut_by_any_mesh_comes_together_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Uneven and empty pieces, HSDP, several cuts of a dimension, FSDP over tensor parallelism (strided)."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    grid = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda g: max(g) > 1)))
    shape = data.draw(st.lists(st.integers(1, 11), min_size=1, max_size=3))
    dims = [data.draw(st.none() | st.integers(0, len(shape) - 1)) for _ in grid]
    how: list[Any] = [Replicate() if dim is None else Shard(dim) for dim in dims]
    if len(grid) > 1 and data.draw(st.booleans(), label="strided"):
        # on the last two mesh dimensions, as torch itself places them
        dim = data.draw(st.integers(0, len(shape) - 1))
        how = [*(Replicate() for _ in grid[2:]), _StridedShard(dim, split_factor=grid[-1]), Shard(dim)]
    value = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    folder = tmp_path_factory.mktemp("cut")
    cut_ranks(folder / "ranks", grid, {"w": (value, how)})
    assert_same_tensors(_converted(folder / "ranks", folder), {"w": value})


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(0, 40),
    grid=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    reading=st.sampled_from(["ordered", "nested", "dealt"]),
)
def test_a_dimension_cut_along_all_of_a_mesh_is_in_each_rank_once(
    size: int, grid: list[int], reading: Interpretation
) -> None:
    factor = torch.Size(grid[1:]).numel()
    placements = [Placement(0, factor), *(Placement(0) for _ in grid[1:])]
    seen = [0] * size
    for coordinate in itertools.product(*map(range, grid)):
        found = runs_of((size,), tuple(grid), coordinate, placements, {}, reading)
        assert found is not None
        for first, count in found[0]:
            for index in range(first, first + count):
                seen[index] += 1
    assert seen == [1] * size


@pytest.mark.parametrize("is_order", [True, False])
def test_strided_cuts_that_their_sizes_do_not_tell_apart_are_told_by_the_spec(
    tmp_path: Path, *, is_order: bool
) -> None:
    """22 rows on a mesh of 3 x 2 x 2: cut in the order (2, 1, 0), or dealt out from left to right."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    grid, whole, ranks = (3, 2, 2), torch.arange(22.0), tmp_path / "ranks"
    ranks.mkdir()
    strided = _StridedShard(0, split_factor=4), _StridedShard(0, split_factor=2), Shard(0)
    for rank, at in enumerate(itertools.product(*map(range, grid))):
        piece = whole
        for n in (2, 1, 0) if is_order else (0, 1, 2):
            how = Shard(0) if is_order else strided[n]
            piece = how._split_tensor(piece, grid[n], with_padding=False)[0][at[n]]
        with as_rank(rank, 12):
            mesh = init_device_mesh("cpu", grid)
            placed = DTensor.from_local(piece.clone(), mesh, strided, shape=whole.shape, stride=(1,))
            placed._spec.use_strided_shard_as_shard_order = is_order
            torch.save({"w": placed}, ranks / f"rank{rank}.pt")
    assert_same_tensors(_converted(ranks, tmp_path), {"w": whole})


@pytest.mark.parametrize("version", OLD_TORCHES)
def test_files_of_older_torches_become_whole(tmp_path: Path, version: str) -> None:
    """HSDP, FSDP over tensor parallelism, columns, uneven; pickled as torch 2.3 to 2.12 did."""
    whole = {"hsdp": torch.randn(11, 3), "columns": torch.randn(2, 7)}
    # 10 rows: the pieces have the sizes of another reading as well
    whole |= {f"strided {rows}": torch.randn(rows, 3) for rows in (8, 9, 10)}
    folder = tmp_path / "ranks"
    folder.mkdir()
    for rank, (first, second) in enumerate(itertools.product(range(2), range(2))):
        at = (first, second)

        def placed(name: str, piece: torch.Tensor, shards: tuple[Any, ...], at: tuple[int, int] = at) -> Cut:
            return Cut(piece.clone(), tuple(whole[name].shape), (2, 2), at, shards)

        state: dict[str, Any] = {
            "hsdp": placed("hsdp", whole["hsdp"].chunk(2)[second], (None, 0)),
            "columns": placed("columns", whole["columns"].chunk(2, 1)[first], (1, None)),
            "plain": torch.ones(2),
        }
        for name in ("strided 8", "strided 9", "strided 10"):
            # tensor parallelism (the second dimension of the mesh) cut first
            state[name] = placed(name, whole[name].chunk(2)[second].chunk(2)[first], ((0, 2), 0))
        save_as_old_torch(folder / f"model_rank_{rank}.pt", state, version)
    assert_same_tensors(_converted(folder, tmp_path), {**whole, "plain": torch.ones(2)})
    report = ptbin.inspect(str(folder))
    assert (report["verdict"], report["container"]) == ("safe", "torch_ranks")


@pytest.mark.parametrize("version", ["2.10", "2.12"])
def test_a_missing_stage_is_missed_where_older_torches_say_so(tmp_path: Path, version: str) -> None:
    whole, ranks = torch.randn(6, 2), tmp_path / "ranks"
    ranks.mkdir()
    for rank in range(4):
        cut = Cut(whole.chunk(2)[rank % 2].clone(), (6, 2), (2,), (rank % 2,), (0,), rank // 2 * 2, 4)
        save_as_old_torch(ranks / f"rank{rank}.pt", {f"layers.{rank // 2}.w": cut}, version)
    assert_same_tensors(_converted(ranks, tmp_path), {"layers.0.w": whole, "layers.1.w": whole})
    for rank in (2, 3):
        (ranks / f"rank{rank}.pt").unlink()
    with pytest.raises(IncompleteCheckpointError, match=r"saved on 4 ranks.*rank2.pt, rank3.pt"):
        ptbin.convert(str(ranks), str(tmp_path / "x.bin"))


@pytest.mark.parametrize("version", OLD_TORCHES)
def test_summands_are_refused(tmp_path: Path, version: str) -> None:
    for rank in range(2):
        cut = Cut(torch.ones(4), (4,), (2,), (rank,), ("sum",))
        save_as_old_torch(tmp_path / f"rank_{rank}.pt", {"w": cut}, version)
    with pytest.raises(UnsupportedTensorError, match="summand"):
        ptbin.convert(str(tmp_path), str(tmp_path / "out" / "x.bin"))


@pytest.mark.parametrize(("dimension", "shape"), [(0, (8, 2)), (1, (8, 4)), (1, (2, 2048, 256))])
def test_a_flipped_byte_of_a_rank_is_found_however_the_tensor_is_cut(
    tmp_path: Path, dimension: int, shape: tuple[int, ...]
) -> None:
    """In short runs, and in ones of a megabyte."""
    from torch.distributed.tensor import Shard

    whole = torch.arange(float(math.prod(shape))).reshape(shape)
    cut_ranks(tmp_path / "in", (2,), {"w": (whole, [Shard(dimension)])})
    (path,) = (tmp_path / "in").glob("*rank_1*")
    data = bytearray(path.read_bytes())
    data[data.index(whole.chunk(2, dimension)[1].contiguous().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC"):
        ptbin.convert(tmp_path / "in", tmp_path / "x.bin")
    assert not (tmp_path / "x.bin").exists()
