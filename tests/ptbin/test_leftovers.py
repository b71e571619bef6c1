"""Optimizers, schedulers and the like: known by their content, or by a trainer's own name for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin.errors import CheckpointError, CorruptArchiveError, IncompleteCheckpointError, NoStateDictError
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.contents import role_of_leftover
from ptbin.sources.companions import is_companion
from ptbin.sources.leftovers import left_alone_as, leftover_role
from ptbin.sources.opening import find_source
from tests.checkpoints.leftovers import NAMES, leftovers
from tests.checkpoints.parts import weights


def test_all_leftovers_are_named() -> None:
    assert list(NAMES) == list(leftovers())


@pytest.mark.parametrize("name", NAMES)
def test_each_is_known_by_content_and_by_name(tmp_path: Path, name: str) -> None:
    role, content = leftovers()[name]
    for place in (tmp_path / name, tmp_path / "saved.pt"):
        torch.save(content, place)
        with pytest.raises(NoStateDictError) as refused:
            ptbin.convert(str(place), str(tmp_path / "x.bin"))
        assert refused.value.leftover == role
        assert left_alone_as(str(place), refused.value) == role
    assert leftover_role(name) == role
    assert not is_companion(name)
    assert left_alone_as(f"run/{name}", NoStateDictError("of unknown content")) == role


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a list of tensors", [torch.ones(3), torch.ones(2)]),
        ("numbers", {"epoch": 3, "loss": 0.1}),
        (
            "optimizer with weights beside",
            [torch.optim.SGD([torch.ones(2)], 0.1).state_dict(), torch.ones(9)],
        ),
        ("bytes like a generator's", torch.zeros(5000, dtype=torch.uint8)),
    ],
)
def test_what_may_be_weights_is_no_leftover(tmp_path: Path, name: str, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with find_source(str(tmp_path / "x.pt")).open() as reader:
        assert role_of_leftover(read_checkpoint(reader).root) is None


def test_a_model_is_converted_whatever_it_is_called(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "optimizer.pt")
    assert len(ptbin.convert(str(tmp_path / "optimizer.pt"), str(tmp_path / "x.bin"))["tensors"]) == 2


@pytest.mark.parametrize(
    "name", ["optim.weights.pt", "optimal.pt", "scheduler_net.pt", "my_optimizer.pt", "rng.pth"]
)
def test_other_names_say_nothing(name: str) -> None:
    assert leftover_role(name) is None


def test_damage_is_a_problem_under_any_name() -> None:
    errors: list[CheckpointError] = [CorruptArchiveError("damaged")]
    assert [left_alone_as("optimizer.pt", error) for error in errors] == [None]
    assert left_alone_as("optimizer.pt", IncompleteCheckpointError("pieces")) == "optimizer"
    assert left_alone_as("model.pt", IncompleteCheckpointError("pieces")) is None
