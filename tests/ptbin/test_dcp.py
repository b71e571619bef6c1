"""`torch.distributed.checkpoint` folders that several processes wrote: every box where it belongs.

The judge is torch's own `dcp_to_torch_save`; the tensors' bytes are taken from the files without ptbin.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ptbin
from ptbin.errors import (
    NoStateDictError,
)
from ptbin.options import ConvertOptions, Limits
from ptbin.reading.pickle.verdicts import judge_programs
from ptbin.reading.search import find_state_dicts
from ptbin.values.tensors import ByteRange, Joined, Tiled
from tests.bits import assert_same_tensors
from tests.checkpoints.distributed import full_tensors, save_alone
from tests.distributed_folders import (
    FOLDERS,
    at,
    by_torch,
    left_out,
    moments,
    read,
    selected,
    weights_in,
)

pytestmark = pytest.mark.starts_processes


# -- what torch writes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_every_weight_is_where_it_is_said_to_be(
    name: str, dcp_folders: dict[str, Path], tmp_path: Path
) -> None:
    whole = by_torch(dcp_folders[name], tmp_path)
    # torchtitan's has the model's names flat beside the rest; they are found under a name of their own
    model = whole if name == "torchtitan" else at(whole, FOLDERS[name])
    expected = {key: value for key, value in model.items() if isinstance(value, torch.Tensor)}
    assert_same_tensors(weights_in(dcp_folders[name]), expected)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_model_is_chosen(name: str, dcp_folders: dict[str, Path]) -> None:
    checkpoint, _ = read(dcp_folders[name])
    assert selected(checkpoint).path == FOLDERS[name]


@pytest.mark.parametrize("name", FOLDERS)
def test_what_torch_writes_is_safe(name: str, dcp_folders: dict[str, Path]) -> None:
    report = judge_programs(read(dcp_folders[name])[0].programs)
    assert report.verdict == "safe", [g for g in report.globals if g.verdict != "safe"]


@pytest.mark.parametrize("name", ["tensor_parallel", "tensor_parallel_4", "mesh"])
def test_the_numbers_are_those_given_to_the_ranks(name: str, dcp_folders: dict[str, Path]) -> None:
    found = weights_in(dcp_folders[name])
    expected = full_tensors()
    assert_same_tensors({key: found[key] for key in expected}, expected)


def test_the_optimizer_comes_with_the_tree(dcp_folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, files = read(dcp_folders["fsdp2"])
    expected = by_torch(dcp_folders["fsdp2"], tmp_path)["optim"]
    found = at(checkpoint.root, "optim")
    for name, kept in expected["state"].items():
        for key, tensor in kept.items():
            assert_same_tensors({key: files.tensor(found.get("state").get(name).get(key))}, {key: tensor})
    (group,) = found.get("param_groups")
    assert group.by_name() == expected["param_groups"][0]


def test_plain_values_are_read(dcp_folders: dict[str, Path]) -> None:
    checkpoint, _ = read(dcp_folders["torchtitan"])
    assert checkpoint.root.get("lr_scheduler").get("last_epoch") == 4
    assert checkpoint.root.get("train_state").get("losses") == [1.0, 2.0]
    assert checkpoint.root.get("dataloader").get("dp_rank_1").get("position") == 1
    assert read(dcp_folders["tensor_parallel"])[0].root.get("step") == 3


def test_what_stays_behind_is_named(dcp_folders: dict[str, Path]) -> None:
    left = left_out(read(dcp_folders["torchtitan"])[0])
    assert left.keys() == {"optimizer", "lr_scheduler", "train_state.step", "dataloader"}
    assert left["optimizer"] > 0
    assert left_out(read(dcp_folders["lightning"])[0]).keys() == {
        "optimizer_0",
        "meta.pt",
    }


def test_rows_are_joined_and_columns_tiled(dcp_folders: dict[str, Path]) -> None:
    checkpoint, _ = read(dcp_folders["tensor_parallel"])
    model = checkpoint.root.get("model")
    kinds = {name: type(ref.storage.place) for name, ref in model.pairs}
    assert kinds["rows"] is kinds["uneven_rows"] is kinds["one_row"] is Joined
    assert kinds["columns"] is kinds["middle"] is Tiled
    assert kinds["replicated"] is kinds["plain"] is kinds["scalar"] is ByteRange
    assert all(part.crc32 is not None for part in model.get("rows").storage.place.parts)


def test_ranks_without_a_share_leave_nothing(dcp_folders: dict[str, Path]) -> None:
    checkpoint, _ = read(dcp_folders["tensor_parallel_4"])
    place = checkpoint.root.get("model").get("fewer_rows_than_ranks").storage.place
    assert isinstance(place, Joined)
    assert len(place.parts) == 3


def test_the_order_is_the_state_dicts_own(dcp_folders: dict[str, Path]) -> None:
    assert list(weights_in(dcp_folders["fsdp2"])) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
        "2.weight",
        "2.bias",
    ]


# -- end to end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_converts(name: str, dcp_folders: dict[str, Path], tmp_path: Path) -> None:
    ptbin.convert(str(dcp_folders[name]), str(tmp_path / "out.bin"), ConvertOptions(verify="load"))
    found = torch.load(tmp_path / "out.bin", weights_only=True)
    tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    assert_same_tensors(tensors, weights_in(dcp_folders[name]))


def test_a_folder_of_optimizers_only(tmp_path: Path) -> None:
    folder = save_alone(tmp_path / "saved", {"optim": moments()})
    checkpoint, _ = read(folder)
    assert not [c for c in find_state_dicts(checkpoint, Limits()).candidates if not c.auxiliary]
    with pytest.raises(NoStateDictError):
        selected(checkpoint)
