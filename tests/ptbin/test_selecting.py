"""Ways to choose of several state dicts: `select` (one or many), `flatten`, `split`; what each leaves out."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ptbin
from ptbin.errors import AmbiguousStateDictError, NoStateDictError, OutputCollisionError, UsageError
from tests.bits import assert_same_tensors

Tensors = dict[str, torch.Tensor]


def layer(seed: int) -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return OrderedDict({"fc.weight": torch.randn(6, 4), "fc.bias": torch.randn(6)})


def adam() -> dict[str, Any]:
    entry = {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 3), "exp_avg_sq": torch.ones(4, 3)}
    return {"state": {0: entry}, "param_groups": [{"lr": 1e-3, "params": [0]}]}


def gan() -> dict[str, Any]:
    return {"generator": layer(1), "discriminator": layer(2), "optim_g": adam(), "epoch": 3}


def named(prefix: str, state: dict[str, torch.Tensor]) -> Tensors:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def convert(value: Any, folder: Path, name: str = "weights.bin", **options: Any) -> dict[str, Any]:
    torch.save(value, folder / "last.ckpt")
    output = folder / "out" / name
    chosen = ptbin.ConvertOptions(**options)
    manifest = ptbin.convert(str(folder / "last.ckpt"), str(output), chosen)
    assert ptbin.verify(f"{output}.manifest.json") == []
    assert ptbin.inspect(str(folder / "last.ckpt"), options=chosen)["accounting"] == manifest["accounting"]
    return manifest


def load(folder: Path, name: str = "weights.bin") -> Any:
    return torch.load(folder / "out" / name, weights_only=True)


# ---- select


def test_several_paths_are_a_union_under_their_paths(tmp_path: Path) -> None:
    manifest = convert(gan(), tmp_path, select=("generator", "discriminator"))
    assert_same_tensors(load(tmp_path), named("generator", layer(1)) | named("discriminator", layer(2)))
    assert manifest["selected"] == "generator, discriminator"
    assert manifest["accounting"]["left_out"] == {"optimizer": 100}


def test_one_path_has_its_own_names_and_the_rest_is_listed(tmp_path: Path) -> None:
    manifest = convert(gan(), tmp_path, select=("discriminator",))
    assert_same_tensors(load(tmp_path), layer(2))
    rows = {row["path"]: (row["role"], row["nbytes"]) for row in manifest["left_out"] if row["nbytes"]}
    assert rows == {"generator": ("not_selected", 120), "optim_g": ("optimizer", 100)}


def test_a_path_twice_is_one(tmp_path: Path) -> None:
    convert(gan(), tmp_path, select=("generator", "generator"))
    assert_same_tensors(load(tmp_path), layer(1))


def test_modules_and_mappings_may_be_joined(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    convert({"g": model, "d": layer(2)}, tmp_path, select=("g", "d"))
    assert_same_tensors(load(tmp_path), named("g", model.state_dict()) | named("d", layer(2)))


def test_a_path_below_another_is_counted_once(tmp_path: Path) -> None:
    value = {"model": {"w": torch.randn(3), "head": layer(1)}}
    manifest = convert(value, tmp_path, select=("model.head",))
    assert manifest["accounting"]["taken_bytes"] == 120
    assert manifest["accounting"]["left_out"] == {"not_selected": 12}


def test_paths_that_would_give_one_name_are_refused(tmp_path: Path) -> None:
    value = {"a": {"b.w": torch.randn(3)}, "a.b": {"w": torch.randn(3)}}
    with pytest.raises((OutputCollisionError, AmbiguousStateDictError)):
        convert(value, tmp_path, select=("a", "a.b"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", ["nothing", "generator.fc", "epoch", "optim_g.state.7", "generator.fc.weight.0"]
)
def test_a_path_to_no_state_dict_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises((NoStateDictError, AmbiguousStateDictError)):
        convert(gan(), tmp_path, select=("generator", path))
    assert not (tmp_path / "out").exists()


def test_keys_with_dots_are_found(tmp_path: Path) -> None:
    convert({"model.v1": layer(1), "model": {"v2": layer(2)}}, tmp_path, select="model.v1")
    assert_same_tensors(load(tmp_path), layer(1))


def test_an_optimizer_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    manifest = convert(gan(), tmp_path, select="optim_g.state.0")
    assert set(load(tmp_path)) == {"step", "exp_avg", "exp_avg_sq"}
    assert manifest["accounting"]["left_out"] == {"not_selected": 240}


# ---- flatten


def test_nested_mappings_sequences_and_modules_become_one(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    value: dict[str, Any] = {
        "enc": {"blocks": [layer(1), layer(2)], 0: torch.randn(2)},
        "head": model,
        "optim": adam(),
    }
    manifest = convert(value, tmp_path, flatten=True)
    wanted = (
        named("enc.blocks.0", layer(1)) | named("enc.blocks.1", layer(2)) | named("head", model.state_dict())
    )
    assert_same_tensors(load(tmp_path), wanted | {"enc.0": value["enc"][0]})
    assert manifest["accounting"]["left_out"] == {"optimizer": 100}


def test_names_are_relative_to_the_selected_place(tmp_path: Path) -> None:
    value = {"model": {"language": {"emb": layer(1)}, "vision": layer(2)}, "iteration": 3}
    convert(value, tmp_path, select="model", flatten=True)
    assert_same_tensors(load(tmp_path), named("language.emb", layer(1)) | named("vision", layer(2)))


def test_several_places_are_flattened_side_by_side(tmp_path: Path) -> None:
    value = {"a": {"x": layer(1)}, "b": {"y": layer(2)}, "c": {"z": layer(3)}}
    manifest = convert(value, tmp_path, select=("a", "b"), flatten=True)
    assert_same_tensors(load(tmp_path), named("a.x", layer(1)) | named("b.y", layer(2)))
    assert manifest["accounting"]["left_out"] == {"not_selected": 120}


def test_flattened_names_that_meet_are_refused(tmp_path: Path) -> None:
    """`{"a": {"b": T}, "a.b": T}`: one of the two would be lost."""
    value = {"a": {"b": torch.randn(3)}, "a.b": torch.randn(3), "c": layer(1)}
    with pytest.raises((OutputCollisionError, AmbiguousStateDictError)):
        convert(value, tmp_path, flatten=True)
    assert not (tmp_path / "out").exists()


def test_keys_without_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AmbiguousStateDictError):
        convert(
            {"m": {("a", 0): layer(1), "b": layer(2)}, "n": {None: torch.randn(2)}}, tmp_path, flatten=True
        )


def test_an_averaged_copy_goes_along_under_its_name(tmp_path: Path) -> None:
    convert({"model": layer(1), "ema": layer(2)}, tmp_path, flatten=True)
    assert_same_tensors(load(tmp_path), named("model", layer(1)) | named("ema", layer(2)))


# ---- split


def test_each_state_dict_has_an_output_and_one_manifest_vouches_for_all(tmp_path: Path) -> None:
    manifest = convert(gan(), tmp_path, split=True)
    names = [file["path"] for file in manifest["outputs"]]
    assert names == ["weights.generator.bin", "weights.discriminator.bin"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "weights.bin.manifest.json"}
    assert_same_tensors(load(tmp_path, names[0]), layer(1))
    assert_same_tensors(load(tmp_path, names[1]), layer(2))
    assert {row["file"] for row in manifest["tensors"]} == set(names)
    assert manifest["accounting"]["left_out"] == {"optimizer": 100}
    assert ptbin.verify(str(tmp_path / "out" / "weights.bin.manifest.json"), level="load") == []


def test_a_damaged_one_of_them_fails_the_manifest(tmp_path: Path) -> None:
    convert(gan(), tmp_path, split=True)
    damaged = tmp_path / "out" / "weights.discriminator.bin"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert ptbin.verify(str(tmp_path / "out" / "weights.bin.manifest.json")) != []


def test_selected_ones_alone_are_split(tmp_path: Path) -> None:
    value = {**gan(), "encoder": layer(3)}
    manifest = convert(value, tmp_path, split=True, select=("encoder", "generator"))
    assert [file["path"] for file in manifest["outputs"]] == ["weights.encoder.bin", "weights.generator.bin"]
    assert manifest["accounting"]["left_out"]["not_selected"] == 120


def test_a_single_state_dict_keeps_the_name(tmp_path: Path) -> None:
    manifest = convert({"model": layer(1), "optim": adam()}, tmp_path, split=True)
    assert [file["path"] for file in manifest["outputs"]] == ["weights.bin"]


def test_the_same_weights_twice_are_one_output(tmp_path: Path) -> None:
    shared = layer(1)
    manifest = convert({"model": shared, "state_dict": shared, "head": layer(2)}, tmp_path, split=True)
    assert len(manifest["outputs"]) == 2


def test_split_into_safetensors(tmp_path: Path) -> None:
    manifest = convert(gan(), tmp_path, "weights.safetensors", split=True, format="safetensors")
    first, second = (tmp_path / "out" / file["path"] for file in manifest["outputs"])
    assert (first.name, second.name) == ("weights.generator.safetensors", "weights.discriminator.safetensors")
    assert_same_tensors(load_file(first), layer(1))
    assert_same_tensors(load_file(second), layer(2))


def test_split_into_raw(tmp_path: Path) -> None:
    manifest = convert(gan(), tmp_path, "weights.raw", split=True, format="raw")
    for file, state in zip(
        [f for f in manifest["outputs"] if f["path"].endswith(".raw")], (layer(1), layer(2)), strict=True
    ):
        index = json.loads((tmp_path / "out" / f"{file['path']}.index.json").read_text())
        assert index
        for row in (row for row in manifest["tensors"] if row["file"] == file["path"]):
            data = (tmp_path / "out" / file["path"]).read_bytes()[row["offset"] :][: row["nbytes"]]
            assert data == state[row["name"]].numpy().tobytes()


def test_split_into_shards(tmp_path: Path) -> None:
    manifest = convert(gan(), tmp_path, split=True, max_shard_size=100)
    names = {file["path"] for file in manifest["outputs"]}
    for part, state in (("generator", layer(1)), ("discriminator", layer(2))):
        weight_map = json.loads((tmp_path / "out" / f"weights.{part}.bin.index.json").read_text())[
            "weight_map"
        ]
        assert set(weight_map) == set(state)
        assert len(set(weight_map.values())) == 2
        found = {name: load(tmp_path, file)[name] for name, file in weight_map.items()}
        assert_same_tensors(found, state)
        names -= set(weight_map.values())
    assert names == {"weights.generator.bin.index.json", "weights.discriminator.bin.index.json"}


def test_split_with_other_options(tmp_path: Path) -> None:
    manifest = convert(
        gan(), tmp_path, split=True, dtype="float16", drop=("bias$",), rename=(("^fc", "layer"),)
    )
    for file, state in zip(manifest["outputs"], (layer(1), layer(2)), strict=True):
        assert_same_tensors(load(tmp_path, file["path"]), {"layer.weight": state["fc.weight"].half()})
    assert manifest["accounting"]["left_out"] == {"dropped": 48, "optimizer": 100}


HOSTILE = [
    "../../../etc/passwd",
    "/abs/olute",
    "..",
    ".",
    "C:\\windows\\system32",
    "a\x00b",
    "naïve\u202e",
    "x" * 5000,
    "CON",
    "",
    "new\nline",
    "a/b",
    "a?b",
    "A/B",
]


def test_hostile_paths_never_reach_file_names(tmp_path: Path) -> None:
    value = {name: layer(index) for index, name in enumerate(HOSTILE)}
    manifest = convert(value, tmp_path, split=True)
    assert len(manifest["outputs"]) == len(HOSTILE)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {file["path"] for file in manifest["outputs"]} | {"weights.bin.manifest.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "last.ckpt"}
    plain = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    for name in written:
        assert set(name) <= plain
        assert len(name) < 200
        assert ".." not in name
    assert len({name.casefold() for name in written}) == len(written)
    for file, state in zip(manifest["outputs"], map(layer, range(len(HOSTILE))), strict=True):
        assert_same_tensors(load(tmp_path, file["path"]), state)


def test_fewer_parts_than_before_leave_nothing_stale(tmp_path: Path) -> None:
    convert({**gan(), "encoder": layer(3)}, tmp_path, split=True)
    manifest = convert(gan(), tmp_path, split=True)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {file["path"] for file in manifest["outputs"]} | {"weights.bin.manifest.json"}


def test_split_and_flatten_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        ptbin.ConvertOptions(split=True, flatten=True)


def test_the_refusal_names_the_three_ways_and_the_candidates(tmp_path: Path) -> None:
    with pytest.raises(AmbiguousStateDictError) as refusal:
        convert(gan(), tmp_path)
    for words in ("--select", "--flatten", "--split", "generator", "discriminator"):
        assert words in str(refusal.value)


def test_tensors_that_lie_very_deep_are_not_said_to_be_missing(tmp_path: Path) -> None:
    deep: Any = {"weight": torch.ones(2)}
    for level in range(30):
        deep = {f"l{level}": deep}
    with pytest.raises(NoStateDictError, match="--flatten takes what lies deeper"):
        convert(deep, tmp_path)
    assert len(convert(deep, tmp_path, flatten=True)["tensors"]) == 1
    nothing: Any = {"weight": 1}
    for level in range(30):
        nothing = {f"l{level}": nothing}
    with pytest.raises(NoStateDictError, match="in what it holds"):
        convert(nothing, tmp_path, name="b.bin")
