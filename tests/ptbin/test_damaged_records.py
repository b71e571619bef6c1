"""A damaged byte is found wherever a record goes: to several tensors, reordered, cast, to several shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin import ConvertOptions
from ptbin.errors import ChecksumMismatchError
from tests.checkpoints.deepspeed_zero import by_hand

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, WIDTH = 1536, 512
"""A record of 3 MiB: more than is ever read only to confirm a checksum."""


def qkv(index: int) -> list[dict[str, Any]]:
    return [{"split": [0, [8, 3, -1]]}, {"take": [1, index, 1]}, {"flatten": [0, 2]}]


def recipe(*rules: dict[str, Any]) -> str:
    return json.dumps({"name": "mine", "tensors": list(rules), "others": "keep"})


RECIPES = {
    "rows of groups": [{"from": "w", "to": n, "steps": qkv(i)} for i, n in enumerate("qkv")],
    "blocks of rows": [
        {"from": "w", "to": f"w{i}", "steps": [{"take": [0, 512 * i, 512]}]} for i in range(3)
    ],
    "columns": [{"from": "w", "to": f"w{i}", "steps": [{"take": [1, 256 * i, 256]}]} for i in range(2)],
    "transposed": [{"from": "w", "to": "w", "steps": [{"order": [1, 0]}]}],
    "unstacked": [
        {
            "from": "w",
            "to": "w{e}",
            "steps": [{"split": [0, [48, 32]]}, {"unstack": [0, "e"]}],
        }
    ],
}
WISHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "cast": {"dtype": "bfloat16"},
    "sharded": {"max_shard_size": 700_000},
    "safetensors": {"format": "safetensors"},
}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("wishes", WISHES.values(), ids=WISHES)
@pytest.mark.parametrize("rules", RECIPES.values(), ids=RECIPES)
def test_a_record_that_a_recipe_takes_apart(
    rules: list[dict[str, Any]], wishes: dict[str, Any], tmp_path: Path
) -> None:
    source = tmp_path / "m.pt"
    weight = torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH)
    torch.save({"w": weight, "norm": torch.ones(3)}, source)
    options = ConvertOptions(recipe=recipe(*rules), **wishes)
    sound = ptbin.convert(str(source), str(tmp_path / "sound" / "x.bin"), options)
    assert not [row["name"] for row in sound["tensors"] if "source_checked" in row]
    start = source.read_bytes().index(weight.numpy().tobytes()[:4096])
    for offset in (0, weight.nbytes // 2 + 5, weight.nbytes - 1):
        flip(source, start + offset)
        with pytest.raises(ChecksumMismatchError, match="data/0 has CRC-32"):
            ptbin.convert(str(source), str(tmp_path / "out" / "x.bin"), options)
        assert not list(tmp_path.glob("out/*.manifest.json"))
        flip(source, start + offset)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_flat_partition_of_zero(name: str, tmp_path: Path) -> None:
    weights = {"a": torch.randn(500, 700), "b": torch.randn(300, 1000), "c": torch.randn(77)}
    tag = by_hand(tmp_path, [weights], stage=2, world_size=2)
    ptbin.convert(str(tag), str(tmp_path / "sound.bin"))
    last = weights[name].numpy().tobytes()[-64:]
    (path,) = [path for path in tag.glob("*optim_states.pt") if last in path.read_bytes()]
    flip(path, path.read_bytes().index(last))
    with pytest.raises(ChecksumMismatchError):
        ptbin.convert(str(tag), str(tmp_path / "out.bin"))
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_view_that_reorders_its_storage(dtype: str | None, tmp_path: Path) -> None:
    source = tmp_path / "m.pt"
    weight = torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH)
    torch.save({"w": weight.T, "v": weight[:, ::2]}, source)
    start = source.read_bytes().index(weight.numpy().tobytes()[:4096])
    flip(source, start + weight.nbytes - 3)
    with pytest.raises(ChecksumMismatchError):
        ptbin.convert(
            str(source), str(tmp_path / "x.safetensors"), ConvertOptions(format="safetensors", dtype=dtype)
        )


def test_a_small_view_of_a_large_storage_says_that_it_is_not_confirmed(tmp_path: Path) -> None:
    source = tmp_path / "m.pt"
    weight = torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH)
    torch.save({"w": weight[:100], "norm": torch.ones(3)}, source)
    manifest = ptbin.convert(str(source), str(tmp_path / "x.bin"))
    assert {row["name"]: row.get("source_checked", True) for row in manifest["tensors"]} == {
        "w": False,
        "norm": True,
    }


def test_what_little_no_tensor_takes_is_read_to_confirm_the_rest(tmp_path: Path) -> None:
    source = tmp_path / "m.pt"
    weight = torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH)
    torch.save({"w": weight[: ROWS - 100]}, source)
    manifest = ptbin.convert(str(source), str(tmp_path / "x.bin"))
    assert "source_checked" not in manifest["tensors"][0]
    start = source.read_bytes().index(weight.numpy().tobytes()[:4096])
    flip(source, start + weight.nbytes - 1)
    with pytest.raises(ChecksumMismatchError):
        ptbin.convert(str(source), str(tmp_path / "y.bin"))
