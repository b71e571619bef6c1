"""What ranks of real processes saved: a piece is never the whole, and what is whole is read as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ptbin
from ptbin import ConvertOptions
from ptbin.errors import CheckpointError, IncompleteCheckpointError
from tests.bits import assert_same_tensors
from tests.checkpoints.rank_files import full_tensors, make_rank_files

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.starts_processes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rank_files(tmp_path_factory.mktemp("ranks"))


def _alone(path: Path, tmp_path: Path) -> str:
    """The file under a name that says nothing, without its siblings."""
    return str(shutil.copy(path, tmp_path / f"saved{path.suffix}"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dtensor_piece_says_so_of_itself(made: Path, tmp_path: Path, rank: int) -> None:
    source = _alone(made / "dtensors" / f"model_world_size_2_rank_{rank}.pt", tmp_path)
    with pytest.raises(IncompleteCheckpointError, match="pieces of DTensors that lie on 2 ranks"):
        ptbin.convert(source, str(tmp_path / "x.bin"))
    assert ptbin.inspect(source)["reason"] == "incomplete_checkpoint"
    options = ConvertOptions(parts=True, verify="load")
    manifest = ptbin.convert(source, str(tmp_path / "x.bin"), options)
    assert "DTensors" in manifest["part"]
    local = {name: value.chunk(2)[rank] for name, value in full_tensors().items()}
    found = torch.load(tmp_path / "x.bin", weights_only=True)
    assert_same_tensors(found, {**local, "plain": torch.arange(3.0)})


@pytest.mark.parametrize("name", ["replicated", "mesh_of_one"])
def test_a_dtensor_that_is_whole_here_is_its_local_tensor(made: Path, tmp_path: Path, name: str) -> None:
    manifest = ptbin.convert(str(made / name / "state.pt"), str(tmp_path / "x.bin"))
    assert "part" not in manifest
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), full_tensors())


def test_a_summand_is_not_the_whole_though_it_has_its_size(made: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompleteCheckpointError, match="DTensors"):
        ptbin.convert(str(made / "partial" / "state.pt"), str(tmp_path / "x.bin"))


@pytest.mark.parametrize("name", ["dtensors", "sharded_tensors"])
def test_the_folder_of_all_ranks_is_whole(made: Path, tmp_path: Path, name: str) -> None:
    expected = {**full_tensors(), "plain": torch.arange(3.0)}
    if name == "sharded_tensors":
        expected = torch.load(made / "fsdp1_model.pt", weights_only=True)
    ptbin.convert(str(made / name), str(tmp_path / "x.bin"), ConvertOptions(verify="load"))
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), expected)


def test_a_shard_that_no_file_has_is_missed(made: Path, tmp_path: Path) -> None:
    for rank in range(2):
        shutil.copy(made / "sharded_tensors" / "rank0.pt", tmp_path / f"rank{rank}.pt")
    with pytest.raises(IncompleteCheckpointError, match=r"1 of 2 shards of .* are in none of 2 files"):
        ptbin.convert(str(tmp_path), str(tmp_path / "x.bin"))


@pytest.mark.parametrize("name", ["dtensors", "sharded_tensors", "safetensors"])
def test_each_file_of_a_folder_is_incomplete(made: Path, tmp_path: Path, name: str) -> None:
    files = [path for path in (made / name).iterdir() if path.suffix in (".pt", ".safetensors")]
    assert len(files) == 2
    for path in files:
        with pytest.raises(IncompleteCheckpointError):
            ptbin.convert(str(path), str(tmp_path / "x.bin"))


def test_a_sharded_tensor_is_never_taken_for_the_whole(made: Path, tmp_path: Path) -> None:
    source = _alone(made / "sharded_tensors" / "rank0.pt", tmp_path)
    with pytest.raises(CheckpointError):
        ptbin.convert(source, str(tmp_path / "x.bin"))
    report = ptbin.inspect(source)
    assert report["reason"] == "incomplete_checkpoint"
    assert "ShardedTensors that lie on 2 ranks" in report["detail"]


def test_sharding_info_tells_of_a_piece_under_any_name(made: Path, tmp_path: Path) -> None:
    refused = []
    for path in (made / "safetensors").glob("*.safetensors"):
        source = _alone(path, tmp_path)
        try:
            ptbin.convert(source, str(tmp_path / "x.bin"))
        except IncompleteCheckpointError as error:
            refused.append("DCP_SHARDING_INFO" in str(error))
    # The first rank's begin at zero: only its own name tells.
    assert refused == [True]
