"""Checkpoints of several files in a listing: which files are one, what it is called, when it has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ptbin
from ptbin import ConvertOptions, catalog
from ptbin.errors import CorruptArchiveError, SourceChangedError, UsageError
from ptbin.sources.opening import find_source
from ptbin.stores.joined import PART_BITS
from tests.bits import assert_same_tensors
from tests.checkpoints.deepspeed_zero import by_hand
from tests.checkpoints.distributed import save_alone

pytestmark = pytest.mark.filterwarnings("ignore")

STATE_DICT = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one checkpoint of each kind, and files beside them that are none."""
    root = tmp_path / "store"
    save_alone(root / "run1" / "step-9", {"model": dict(STATE_DICT)})
    by_hand(root / "zero", [STATE_DICT], stage=2, world_size=2)
    torch.save(STATE_DICT, root / "plain.pt")
    for name, options in {
        "hub/model.safetensors": ConvertOptions(format="safetensors", max_shard_size=20),
        "bare/x.bin": ConvertOptions(format="raw"),
    }.items():
        ptbin.convert(str(root / "plain.pt"), str(root / name), options)
    (root / "hub" / "config.json").write_text("{}")
    (root / "zero" / "latest").write_text("global_step2")
    return root


def test_each_is_listed_once_under_its_handle(store: Path) -> None:
    found = {item.path: item.size for item in catalog.find_checkpoints(str(store)) if item.certain}
    tag = next(path.name for path in (store / "zero").iterdir() if path.is_dir())
    assert set(found) == {
        "run1/step-9",
        f"zero/{tag}",
        "plain.pt",
        "hub/model.safetensors.index.json",
        "bare/x.bin.index.json",
    }
    assert found["run1/step-9"] == sum(path.stat().st_size for path in (store / "run1/step-9").iterdir())


def test_outputs_are_named_after_the_handle(store: Path) -> None:
    found = [item for item in catalog.find_checkpoints(str(store)) if item.certain]
    jobs, problems = catalog.plan_outputs(found, "out")
    assert problems == []
    names = {job.path: job.dest_uri for job in jobs}
    assert names["run1/step-9"] == "out/run1/step-9.bin"
    assert names["hub/model.safetensors.index.json"] == "out/hub/model.bin"
    assert names["bare/x.bin.index.json"] == "out/bare/x.bin"
    hub, _ = catalog.plan_outputs(found, "out", layout="hf", format="safetensors")
    names = {job.path: job.dest_uri for job in hub}
    assert names["run1/step-9"] == "out/run1/step-9/model.safetensors"
    assert names["hub/model.safetensors.index.json"] == "out/hub/model.safetensors"


def test_all_of_them_convert_and_are_then_up_to_date(store: Path, tmp_path: Path) -> None:
    found = [item for item in catalog.find_checkpoints(str(store)) if item.certain]
    jobs, _ = catalog.plan_outputs(found, str(tmp_path / "out"))
    for job in jobs:
        assert not catalog.is_up_to_date(job, ConvertOptions())
        manifest = ptbin.convert(job.source_uri, job.dest_uri)
        assert manifest["source"]["identity"] == (job.identity.to_json() if job.identity else None)
        assert catalog.is_up_to_date(job, ConvertOptions()), job.path
        loaded = torch.load(job.dest_uri, weights_only=True)
        assert_same_tensors({name: loaded[name] for name in STATE_DICT}, STATE_DICT)


def test_a_part_that_changes_is_noticed(store: Path, tmp_path: Path) -> None:
    index = store / "hub" / "model.safetensors.index.json"
    before = catalog.find_one(str(index))
    shard = next(store.glob("hub/*-00001-of-*.safetensors"))
    shard.touch()
    assert catalog.find_one(str(index)).identity != before.identity
    with find_source(str(index)).open() as reader:
        reader.read(1 << PART_BITS, 8)  # the first shard is open now
        shard.write_bytes(shard.read_bytes() + b"x")
        with pytest.raises(SourceChangedError):
            reader.check_unchanged()
    with pytest.raises(CorruptArchiveError, match="truncated"):
        ptbin.convert(str(index), str(tmp_path / "x.bin"))


def test_a_folder_may_be_named_where_it_is_one_checkpoint(store: Path, tmp_path: Path) -> None:
    for name in ("run1/step-9", "hub"):
        ptbin.convert(str(store / name), str(tmp_path / "x.bin"))
        assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), STATE_DICT)
    with pytest.raises(UsageError, match="not one checkpoint"):
        ptbin.convert(str(store), str(tmp_path / "x.bin"))


def test_an_index_that_puts_tensors_elsewhere_is_refused(store: Path, tmp_path: Path) -> None:
    index = store / "hub" / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    files = sorted(set(told["weight_map"].values()))
    told["weight_map"]["a"], told["weight_map"]["b"] = reversed(files)
    index.write_text(json.dumps(told))
    with pytest.raises(CorruptArchiveError, match="the index puts"):
        ptbin.convert(str(index), str(tmp_path / "x.bin"))


def test_a_folder_is_what_its_index_names_however_the_shards_are_called(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    weights = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    for name, tensor in weights.items():
        safetensors.torch.save_file({name: tensor}, folder / f"part_{name}.safetensors")
    index = {"weight_map": {name: f"part_{name}.safetensors" for name in weights}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ptbin.convert(folder, tmp_path / "x.bin")
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), weights)
