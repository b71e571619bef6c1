"""Files of ranks that were copied over one another, or have each other's names, are refused."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ptbin
from ptbin.errors import IncompleteCheckpointError
from tests.checkpoints.deepspeed_slices import write_ranks as write_deepspeed_ranks
from tests.checkpoints.deepspeed_slices import write_zero_ranks
from tests.checkpoints.deepspeed_zero import by_hand
from tests.checkpoints.llama import write_meta_parts
from tests.checkpoints.megatron_files import Grid, Model, whole, write_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

MODEL = Model()


def _megatron(folder: Path, grid: Grid) -> None:
    """As Megatron writes them: each file's arguments have the number of the process that saved it."""
    write_ranks(folder, MODEL, whole(MODEL), grid)
    for number, path in enumerate(
        sorted(folder.glob("*/*.pt"), key=lambda p: p.parts[-2][11:] + p.parts[-2])
    ):
        states = torch.load(path, weights_only=False)
        states["args"].rank = number
        torch.save(states, path)


def _zero(folder: Path, stage: int) -> None:
    groups = [{"a": torch.randn(5, 3), "b": torch.randn(7)}, {"c": torch.randn(4)}]
    by_hand(folder, groups, stage=stage, world_size=2)


MAKERS: dict[str, Callable[[Path], object]] = {
    "meta": lambda folder: write_meta_parts(folder, 2),
    "megatron tensor": lambda folder: _megatron(folder, Grid(tensor=2)),
    "megatron pipeline": lambda folder: _megatron(folder, Grid(pipeline=2, counts=(1, 1))),
    "megatron both": lambda folder: _megatron(folder, Grid(tensor=2, pipeline=2, counts=(1, 1))),
    "deepspeed": lambda folder: write_deepspeed_ranks(folder, 2),
    "zero 2": lambda folder: _zero(folder, 2),
    "zero 3": lambda folder: _zero(folder, 3),
}


def _weights(folder: Path, dest: Path) -> dict[str, torch.Tensor]:
    ptbin.convert(folder, dest, ptbin.ConvertOptions(force=True))
    found: dict[str, torch.Tensor] = torch.load(dest, weights_only=True)
    return found


@pytest.mark.parametrize("kind", MAKERS)
def test_no_copy_and_no_exchange_of_files_passes(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    MAKERS[kind](tmp_path / "in")
    folder = tmp_path / "in" / "global_step2" if kind.startswith("zero") else tmp_path / "in"
    expected = _weights(folder, tmp_path / "o.bin")
    for first, second in itertools.permutations([p for p in folder.rglob("*") if p.suffix != ".json"], 2):
        if not (first.is_file() and second.is_file()):
            continue
        kept = second.read_bytes()
        for data in (first.read_bytes(), kept):  # a copy, then an exchange
            second.write_bytes(first.read_bytes())
            first.write_bytes(data)
            try:
                found = _weights(folder, tmp_path / "o.bin")
            except ptbin.errors.CheckpointError:
                pass
            else:  # what is exchanged is not used, or says itself where it belongs
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
            first.write_bytes(second.read_bytes())
            second.write_bytes(kept)


def test_files_that_were_renamed_with_their_content_are_taken(tmp_path: Path) -> None:
    expected = write_zero_ranks(tmp_path / "in", 2, stage=2, world_size=2)  # saved as mp_rank_00, moved
    assert expected.keys() <= _weights(tmp_path / "in", tmp_path / "o.bin").keys()


def test_equal_pieces_of_a_model_that_was_never_trained_are_taken(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for rank in range(2):
        torch.save({"output.weight": torch.zeros(4, 2)}, tmp_path / "in" / f"consolidated.{rank:02d}.pth")
    assert _weights(tmp_path / "in", tmp_path / "o.bin")["output.weight"].shape == (8, 2)


def test_the_message_names_both_files(tmp_path: Path) -> None:
    write_meta_parts(tmp_path / "in", 2)
    shutil.copy(tmp_path / "in" / "consolidated.00.pth", tmp_path / "in" / "consolidated.01.pth")
    with pytest.raises(IncompleteCheckpointError, match=r"01\.pth holds the very tensors of consolidated"):
        _weights(tmp_path / "in", tmp_path / "o.bin")
