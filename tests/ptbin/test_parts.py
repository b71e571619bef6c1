"""No part of a checkpoint is taken for the whole, and no ordinary file for a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import ptbin
from ptbin import ConvertOptions, catalog
from ptbin.errors import CheckpointError, IncompleteCheckpointError, StorageError, UsageError
from ptbin.sources.leftovers import is_leftover
from ptbin.sources.opening import find_source
from ptbin.sources.part_names import find_parts, may_be_part
from ptbin.stores import Place
from ptbin.stores.local import LocalStore
from tests.checkpoints import MadeOnce, factories
from tests.checkpoints.parts import FOLDERS, weights, write
from tests.fakes import CountingStore

pytestmark = pytest.mark.filterwarnings("ignore")

PARTS = ConvertOptions(parts=True)

ORDINARY = """
    epoch_1.pt epoch_2.pt epoch_10.pt epoch_0.pt epoch-00.ckpt epoch=0-step=100.ckpt
    epoch=1-step=200.ckpt last.ckpt best.pt best_rank_0.pth best_rank_1.pth best_rank_2.pth
    top3_rank0.pt top3_rank1.pt rank_loss.pt rank.pt ranker.pt rank_1.pt rank_2.pt lowrank_4.pt
    lowrank4.pt rank-aware.pth lora_rank_8.pt lora_rank_16.pt lora-r8.safetensors model-00.pt
    model-01.pt model_0.pt model_1.pt model_2.pt model.0.pt model.1.pt model-0.bin model-1.bin model.pt
    model.pth model.bin model.safetensors pytorch_model.bin adapter_model.safetensors
    model-00001-of-00001.safetensors pytorch_model-00001-of-00001.bin model_1_of_2.pt fold-1-of-5.pt
    1-of-3.pt layer_0.pt layer_1.pt layer_3.pt layer_00.pt layer_3_expert.pt expert_0.pt expert_1.pt
    layer_0_expert_0.pt consolidated.pth consolidated.00.pth consolidated.pt consolidated.safetensors
    consolidated_01.pth mp_rank_00_model_states.pt mp_rank.pt mp.pt mp_rank_0.txt tp_rank.pt shard.pt
    shard-1.pt shard_0.pt shard_1.pt shard1.pt sharded.pt my-shard1.pt my-shard2.pt reshard0.pt part0.pt
    part1.pt part_1.pth model_part_1.pt model-part-1.pt model_part-1.pt fold0.pt fold1.pt fold_0.pth
    fold_1.pth seed_0.pt seed_1.pt seed1.ckpt run_0.pt run_1.pt checkpoint_0.pt checkpoint_1.pt
    checkpoint_100.pt checkpoint-500.pt ckpt_000.pt ckpt_001.pt ckpt.pt checkpoint_rank0.pt
    world_size_1.pt model_world_size_1_rank_0.pt world_size_1_rank_0.pt step_1000.pt step_2000.pt
    iter_0.pth iter_1.pth iter_0000001.pt global_step10.pt actor.pt critic.pt generator.pth
    discriminator.pth G_0.pth D_0.pth G_1.pth D_1.pth unet.bin vae.pt yolov8n.pt yolov5s-seg.pt
    resnet18-f37072fd.pth vit_base_p16.bin bert-base.bin gpt2-medium.pt t5-11b.pt tokenizer.bin
    scaler_net.pt optimal.pt optimized.pt scheduler_net.pt rng_net.pt args_net.pt state_0.pt state_1.pt
    worker_0.pt worker_1.pt node0.pt node1.pt gpu0.pt gpu1.pt device_0.pt device_1.pt
    shard-00001.safetensors shard-0-model-0-of-1.safetensors metadata.pt common_voice.pt metric_rank0.pt
""".split()


def test_a_hundred_ordinary_names_are_never_parts() -> None:
    assert len(ORDINARY) > 100
    assert len(set(ORDINARY)) == len(ORDINARY)
    assert find_parts(ORDINARY) == []
    for name in ORDINARY:
        assert find_parts([name]) == []


def test_ordinary_files_are_converted_each(tmp_path: Path) -> None:
    for name in ORDINARY:
        if not name.endswith(".txt"):
            write(tmp_path / "in" / name, weights())
    found = {item.path for item in catalog.find_checkpoints(str(tmp_path / "in")) if item.certain}
    assert found == {name for name in ORDINARY if not name.endswith(".txt")}
    for name in found:
        ptbin.convert(str(tmp_path / "in" / name), str(tmp_path / "out.bin"))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_parts_is_one_problem(tmp_path: Path, name: str) -> None:
    FOLDERS[name](tmp_path / "in" / "run")
    (tmp_path / "in" / "run" / "config.json").write_text("{}")
    write(tmp_path / "in" / "plain.pt", weights())
    found = [item for item in catalog.find_checkpoints(str(tmp_path / "in")) if item.certain]
    told = {item.path: _reason(item.uri, tmp_path) for item in found}
    assert told.pop("plain.pt") is None
    assert [told[path] for path in told if not is_leftover(path)] == ["incomplete_checkpoint"]


@pytest.mark.parametrize("name", FOLDERS)
def test_naming_the_folder_says_the_same(tmp_path: Path, name: str) -> None:
    FOLDERS[name](tmp_path / "run")
    assert _reason(str(tmp_path / "run"), tmp_path) == "incomplete_checkpoint"
    assert catalog.find_one(str(tmp_path / "run")).size > 0
    with pytest.raises(IncompleteCheckpointError):
        ptbin.inspect(str(tmp_path / "run"))
    if name.startswith("deepspeed pipeline"):
        # nothing counts their layers: the caller says that these are all
        ptbin.convert(str(tmp_path / "run"), str(tmp_path / "x.bin"), PARTS)
        return
    # Which of the parts?
    with pytest.raises(IncompleteCheckpointError):
        ptbin.convert(str(tmp_path / "run"), str(tmp_path / "x.bin"), PARTS)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_part_is_refused_and_inspect_says_so(tmp_path: Path, name: str) -> None:
    FOLDERS[name](tmp_path / "run")
    parts = [path for path in (tmp_path / "run").rglob("*.*") if "_optim_states" not in path.name]
    for path in parts:
        with pytest.raises(IncompleteCheckpointError) as refused:
            ptbin.convert(str(path), str(tmp_path / "x.bin"))
        report = ptbin.inspect(str(path))
        assert (report["selected"], report["reason"]) == (None, "incomplete_checkpoint")
        assert report["detail"] == str(refused.value)
    assert not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "deepspeed pipeline"])
def test_parts_takes_each_knowingly(tmp_path: Path, name: str) -> None:
    FOLDERS[name](tmp_path / "run")
    found = list(catalog.find_checkpoints(str(tmp_path / "run"), parts=True))
    files = [item for item in found if "_optim_states" not in item.path]
    assert {Path(item.uri) for item in files} == {
        path for path in (tmp_path / "run").rglob("*.*") if "_optim_states" not in path.name
    }
    for item in files:
        manifest = ptbin.convert(item.uri, str(tmp_path / "x.bin"), PARTS)
        assert manifest["part"].startswith("one part of a checkpoint: ")
        assert manifest["options"]["parts"] is True
        _hold_to_schema(tmp_path / "x.bin.manifest.json")


def test_a_whole_file_with_parts_is_no_part(tmp_path: Path) -> None:
    write(tmp_path / "a.pt", weights())
    manifest = ptbin.convert(str(tmp_path / "a.pt"), str(tmp_path / "a.bin"), PARTS)
    assert "part" not in manifest
    assert "parts" not in ConvertOptions().to_json()
    assert ConvertOptions().fingerprint() != PARTS.fingerprint()


@pytest.mark.parametrize("factory", factories(room="parts", refused=True), ids=str)
def test_a_file_that_says_so_of_itself(factory: Any, made_once: MadeOnce, tmp_path: Path) -> None:
    made = made_once(factory)
    with pytest.raises(IncompleteCheckpointError, match="--parts") as refused:
        ptbin.convert(str(made.path), str(tmp_path / "x.bin"))
    report = ptbin.inspect(str(made.path))
    assert (report["selected"], report["reason"]) == (None, "incomplete_checkpoint")
    assert report["detail"] == str(refused.value)
    if factory.name == "megatron_tensor_parallel":
        return  # nested: --select has to say which
    manifest = ptbin.convert(str(made.path), str(tmp_path / "x.bin"), PARTS)
    assert manifest["part"] in str(refused.value)
    _hold_to_schema(tmp_path / "x.bin.manifest.json")


def test_an_index_whose_shard_is_missing_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    files = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for number, name in enumerate(files):
        write(folder / name, {f"x{number}": torch.ones(2)})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"x{n}": name for n, name in enumerate(files)}}))
    assert _reason(str(folder), tmp_path) is None
    (folder / files[1]).unlink()
    for place in (folder, index):
        with pytest.raises(IncompleteCheckpointError, match=f"1 of the 3 files .* missing: {files[1]}"):
            ptbin.convert(str(place), str(tmp_path / "x.bin"))
    found = [item.path for item in catalog.find_checkpoints(str(folder))]
    assert found == [index.name]
    # A shard that is there is a part all the same, and the index is the way out.
    with pytest.raises(IncompleteCheckpointError, match=f"convert {index.name} instead"):
        ptbin.convert(str(folder / files[0]), str(tmp_path / "x.bin"))


def test_an_index_that_was_fetched_without_its_shards_is_no_problem(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", weights())
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert [item.path for item in catalog.find_checkpoints(str(tmp_path))] == ["model.safetensors"]


def test_weights_beside_parts_are_what_the_folder_means(tmp_path: Path) -> None:
    FOLDERS["meta"](tmp_path / "run")
    write(tmp_path / "run" / "model.safetensors", weights())
    manifest = ptbin.convert(str(tmp_path / "run"), str(tmp_path / "x.bin"))
    assert manifest["source"]["uri"].endswith("model.safetensors")
    write(tmp_path / "other" / "final.pt", weights())
    FOLDERS["ranks"](tmp_path / "other")
    with pytest.raises(UsageError, match="name a file"):
        ptbin.convert(str(tmp_path / "other"), str(tmp_path / "x.bin"))


class _Lists(CountingStore):
    """Counts; with `refuses` no listing is granted."""

    refuses = False

    def iter_objects(self, path: str, watch: Any = None) -> Any:
        if self.refuses:
            raise StorageError("no listing")
        return super().iter_objects(path, watch)


@pytest.mark.parametrize(
    ("name", "listings"), [("epoch_1.pt", 0), ("model.bin", 0), ("consolidated.00.pth", 1), ("rank_3.pt", 1)]
)
def test_an_ordinary_name_costs_no_listing(tmp_path: Path, name: str, listings: int) -> None:
    write(tmp_path / name, weights())
    store = _Lists(LocalStore())
    assert find_source(Place(store, str(tmp_path / name))).incomplete == ""
    assert store.count("list") == listings
    assert may_be_part(name) is bool(listings)


def test_a_store_that_lists_nothing_still_hands_out_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        write(tmp_path / name, weights())
    monkeypatch.setattr(_Lists, "refuses", True)
    folder = Place(_Lists(LocalStore()), str(tmp_path))
    assert find_source(folder / "consolidated.00.pth").incomplete == ""
    assert find_source(folder / "consolidated.01.pth").incomplete != ""


def test_listings_hold_groups_of_rank_folders_together(tmp_path: Path) -> None:
    for step in (1, 2):
        FOLDERS["megatron"](tmp_path / f"iter_{step:07d}")
        write(tmp_path / f"iter_{step:07d}" / "mp_rank_00" / "notes.bin", weights())
        write(tmp_path / f"iter_{step:07d}" / "a.bin", weights())
    found = [item.path for item in catalog.find_checkpoints(str(tmp_path))]
    assert sorted(found) == [
        f"iter_000000{step}{name}" for step in (1, 2) for name in ("", "/a.bin", "/mp_rank_00/notes.bin")
    ]


def _reason(source: str, tmp_path: Path) -> str | None:
    try:
        ptbin.convert(source, str(tmp_path / "converted" / "x.bin"))
    except CheckpointError as error:
        return error.reason
    return None


def _hold_to_schema(path: Path) -> None:
    schema = json.loads((Path(ptbin.__file__).parent / "manifest.schema.json").read_text())
    jsonschema.validate(json.loads(path.read_text()), schema)
