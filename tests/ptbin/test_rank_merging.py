"""The files of all ranks become what `full_tensor()` gives; what is wrong stops it and is named."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin import ConvertOptions, catalog
from ptbin.errors import (
    CheckpointError,
    CorruptArchiveError,
    IncompleteCheckpointError,
)
from ptbin.reading.pickle import meshes, numpy_objects, torch_objects
from ptbin.writing.formats import OutputFormat
from tests.bits import assert_same_tensors
from tests.checkpoints.cut_ranks import as_rank, cut_ranks
from tests.checkpoints.meshes import make_meshes
from tests.checkpoints.old_meshes import Cut, save_as_old_torch
from tests.servers.endpoint import S3Endpoint

pytestmark = pytest.mark.filterwarnings("ignore")


KINDS = ("flat", "hsdp", "fsdp_tp", "uneven_tp", "slice", "stages")
WORLD = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real ranks."""
    return make_meshes(tmp_path_factory.mktemp("meshes"), WORLD)


def _converted(source: Path, tmp_path: Path, **options: Any) -> dict[str, torch.Tensor]:
    ptbin.convert(str(source), str(tmp_path / "whole.bin"), ConvertOptions(**options))
    found: dict[str, torch.Tensor] = torch.load(tmp_path / "whole.bin", weights_only=True)
    return found


@pytest.mark.starts_processes
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_become_what_full_tensor_gives(made: Path, tmp_path: Path, kind: str) -> None:
    manifest = ptbin.convert(str(made / kind), str(tmp_path / "whole.bin"), ConvertOptions(verify="load"))
    whole = torch.load(tmp_path / "whole.bin", weights_only=True)
    assert_same_tensors(whole, torch.load(made / f"{kind}.ref.pt", weights_only=True))
    assert manifest["source"]["container"] == "torch_ranks"
    assert len(manifest["source"]["files"]) == WORLD
    assert set(manifest["accounting"]["left_out"]) <= {"replica", "index_table", "unviewed"}
    assert ptbin.verify(str(tmp_path / "whole.bin.manifest.json")) == []


@pytest.mark.starts_processes
@pytest.mark.parametrize("format_name", ["safetensors", "raw"])
def test_other_formats_and_a_cast_hold_the_same(
    made: Path, tmp_path: Path, format_name: OutputFormat
) -> None:
    from safetensors.torch import load_file

    dest = tmp_path / ("x.safetensors" if format_name == "safetensors" else "x.bin")
    ptbin.convert(str(made / "fsdp_tp"), str(dest), ConvertOptions(format=format_name, dtype="bfloat16"))
    expected = torch.load(made / "fsdp_tp.ref.pt", weights_only=True)
    with ptbin.load(str(dest), strip_prefix=None) as weights:
        assert {name: weights.shape(name) for name in weights} == {
            k: tuple(v.shape) for k, v in expected.items()
        }
    if format_name == "safetensors":
        assert_same_tensors(load_file(dest), {k: v.bfloat16() for k, v in expected.items()})


def test_what_all_ranks_share_is_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning 405B in 64 files took three times as long while each tensor asked anew."""
    from torch.distributed.tensor import Shard

    folder = cut_ranks(tmp_path / "ranks", (4,), {f"t{i}": (torch.ones(8, 2), [Shard(0)]) for i in range(40)})
    counts = {"grids": 0, "tables": 0}
    grid_of, numpy_reducers = meshes.grid_of, numpy_objects.iter_numpy_reducers

    def counted_grid(mesh: Any) -> Any:
        counts["grids"] += 1
        return grid_of(mesh)

    def counted_reducers() -> Any:
        counts["tables"] += 1
        return numpy_reducers()

    monkeypatch.setattr(meshes, "grid_of", counted_grid)
    monkeypatch.setattr(torch_objects, "iter_numpy_reducers", counted_reducers)
    ptbin.inspect(str(folder))
    assert counts == {"grids": 4, "tables": 1}


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = torch.randn(8, 2)
    for rank in range(2):
        with as_rank(rank, 2):
            piece = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
            torch.save({"embed": piece, "head": piece}, tmp_path / f"rank{rank}.pt")
    whole = _converted(tmp_path, tmp_path)
    assert_same_tensors(whole, {"embed": weight, "head": weight})
    assert whole["embed"].data_ptr() == whole["head"].data_ptr()


def test_the_model_is_taken_out_of_a_trainers_state(tmp_path: Path) -> None:
    from torch.distributed.tensor import Shard

    tensors = {"w.weight": (torch.randn(6, 2), [Shard(0)])}
    cut_ranks(tmp_path / "a", (2,), tensors)
    (tmp_path / "in").mkdir()
    for rank in range(2):
        state = torch.load(tmp_path / "a" / f"model_world_size_2_rank_{rank}.pt", weights_only=False)
        moments = {"state": {0: {"exp_avg": state["w.weight"]}}, "param_groups": [{"lr": 0.1}]}
        content = {"model": state, "optimizer": moments, "step": 3, "rng": torch.full((5056,), rank).byte()}
        torch.save(content, tmp_path / "in" / f"state_rank_{rank}.pt")
    manifest = ptbin.convert(str(tmp_path / "in"), str(tmp_path / "whole.bin"))
    assert_same_tensors(
        torch.load(tmp_path / "whole.bin", weights_only=True), {"w.weight": tensors["w.weight"][0]}
    )
    assert manifest["selected"] == "model"


# -- what is one checkpoint ------------------------------------------------------------------------------


@pytest.mark.starts_processes
def test_a_bulk_run_finds_the_folder_and_leaves_its_companions_alone(made: Path, tmp_path: Path) -> None:
    actor = tmp_path / "in" / "global_step_10" / "actor"
    shutil.copytree(made / "flat", actor)
    for rank in range(WORLD):
        torch.save({"state": {}}, actor / f"optim_world_size_{WORLD}_rank_{rank}.pt")
        torch.save({"lr_scheduler": {}}, actor / f"extra_state_world_size_{WORLD}_rank_{rank}.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": WORLD}))
    found = [item.path for item in catalog.find_checkpoints(str(tmp_path / "in")) if item.certain]
    assert [path for path in found if "optim_" not in path and "extra_" not in path] == [
        "global_step_10/actor"
    ]


@pytest.mark.starts_processes
def test_layout_hf_takes_the_folder_of_configuration_along(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "flat", tmp_path / "in")
    (tmp_path / "in" / "huggingface").mkdir()
    (tmp_path / "in" / "huggingface" / "config.json").write_text('{"torch_dtype": "float32"}')
    (tmp_path / "in" / "huggingface" / "evil.py").write_text("raise SystemExit")
    (tmp_path / "out").mkdir()
    dest = str(tmp_path / "out" / "pytorch_model.bin")
    ptbin.convert(str(tmp_path / "in"), dest, ConvertOptions(layout="hf"))
    assert (tmp_path / "out" / "config.json").read_text() == '{"torch_dtype": "float32"}'
    assert not (tmp_path / "out" / "evil.py").exists()


def test_mappings_that_hold_one_another_are_looked_into_once(tmp_path: Path) -> None:
    from torch.distributed.tensor import Shard

    folder = cut_ranks(tmp_path / "in", (2,), {"w": (torch.arange(6.0), [Shard(0)])})
    for path in folder.iterdir():
        state = torch.load(path, weights_only=False)
        state |= {f"k{n}": state for n in range(40)}
        torch.save(state, path)
    found = _converted(folder, tmp_path, select=".", drop=("^k",))
    assert_same_tensors(found, {"w": torch.arange(6.0)})


def _tiny(kind: str) -> Any:
    """A model of transformers with random weights."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    if kind == "qwen":
        config = transformers.Qwen3Config(**sizes, **heads, head_dim=8, tie_word_embeddings=True)
        return transformers.Qwen3ForCausalLM(config)
    config = transformers.MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["llama", "qwen", "mixtral"])
def test_transformers_computes_the_same_from_the_merged_folder(tmp_path: Path, kind: str) -> None:
    from torch.distributed.tensor import Replicate, Shard

    model = _tiny(kind)
    tensors: dict[str, tuple[torch.Tensor, list[Any]]] = {
        name: (value, [Shard(0), Shard(value.dim() - 1) if value.dim() > 1 else Replicate()])
        for name, value in model.state_dict().items()
    }
    folder = cut_ranks(tmp_path / "ranks", (4, 2), tensors)
    model.config.save_pretrained(folder / "huggingface")
    dest = tmp_path / "hub" / "model.safetensors"
    ptbin.convert(
        str(folder), str(dest), ConvertOptions(format="safetensors", layout="hf", max_shard_size=20_000)
    )
    assert not any(name.startswith("model_world") for name in os.listdir(dest.parent))
    again = type(model).from_pretrained(dest.parent)
    tokens = torch.arange(9).reshape(1, 9)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_run_on_one_rank_is_its_only_file(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model_world_size_1_rank_0.pt")
    assert_same_tensors(_converted(tmp_path, tmp_path), {"w": torch.ones(2)})


# -- what is refused -----------------------------------------------------------------------------------


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def _without_last(folder: Path) -> None:
    (folder / "model_world_size_4_rank_3.pt").unlink()


def _renamed(folder: Path) -> None:
    """As many files as there should be, one of them twice."""
    shutil.copy(folder / "model_world_size_4_rank_1.pt", folder / "model_world_size_4_rank_2.pt")


def _truncated(folder: Path) -> None:
    path = folder / "model_world_size_4_rank_1.pt"
    path.write_bytes(path.read_bytes()[:-400])


def _unequal(folder: Path) -> None:
    _edit(folder / "model_world_size_4_rank_2.pt", lambda state: state.update(plain=torch.tensor([0, 1, 3])))


def _other_step(folder: Path) -> None:
    for rank in range(WORLD):
        step = 20 if rank == 2 else 10
        _edit(folder / f"model_world_size_4_rank_{rank}.pt", functools.partial(dict.update, step=step))


def _other_names(folder: Path) -> None:
    _edit(folder / "model_world_size_4_rank_2.pt", lambda state: state.pop("even"))


@pytest.mark.starts_processes
@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (_without_last, "model_world_size_4_rank_3.pt"),
        (_renamed, "plain"),
        (_truncated, "model_world_size_4_rank_1.pt"),
        (_unequal, "model_world_size_4_rank_2.pt"),
        (_other_step, "model_world_size_4_rank_2.pt says step 20"),
        (_other_names, "pieces of 3"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    made: Path, tmp_path: Path, damage: Callable[[Path], None], names: str
) -> None:
    shutil.copytree(made / "flat", tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises((IncompleteCheckpointError, CorruptArchiveError)) as caught:
        ptbin.convert(str(tmp_path / "in"), str(tmp_path / "x.bin"))
    if damage is not _renamed:
        assert names in str(caught.value)
    assert not (tmp_path / "x.bin").exists()


@pytest.mark.starts_processes
def test_a_missing_stage_of_a_pipeline_is_missed(made: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for rank in range(2):
        shutil.copy(
            made / "stages" / f"model_world_size_4_rank_{rank}.pt", tmp_path / "in" / f"rank{rank}.pt"
        )
    with pytest.raises(IncompleteCheckpointError, match=r"saved on 4 ranks.*rank2.pt, rank3.pt"):
        ptbin.convert(str(tmp_path / "in"), str(tmp_path / "x.bin"))


@pytest.mark.starts_processes
def test_replicas_of_a_piece_must_be_equal(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "hsdp", tmp_path / "in")

    def change(state: dict[str, Any]) -> None:
        with torch.no_grad():
            state["w"].to_local()[0, 0] += 1

    with as_rank(3, 4):
        _edit(tmp_path / "in" / "model_world_size_4_rank_3.pt", change)
    with pytest.raises(
        IncompleteCheckpointError, match=r"'w' should be the same in .*rank_1.pt and .*rank_3.pt"
    ):
        ptbin.convert(str(tmp_path / "in"), str(tmp_path / "x.bin"))


def test_files_in_which_nothing_is_distributed_are_not_guessed_at(tmp_path: Path) -> None:
    """Equal pieces of a tensor look like copies of it."""
    for rank in range(2):
        torch.save({"norm.weight": torch.ones(4)}, tmp_path / f"model_rank_{rank}.pt")
    with pytest.raises(IncompleteCheckpointError, match="nothing in them says"):
        ptbin.convert(str(tmp_path), str(tmp_path / "x.bin"))


@pytest.mark.starts_processes
def test_two_sets_of_ranks_in_one_folder_are_refused(made: Path, tmp_path: Path) -> None:
    for kind in ("flat", "hsdp"):
        for rank in range(WORLD):
            shutil.copy(
                made / kind / f"model_world_size_4_rank_{rank}.pt", tmp_path / f"{kind}_rank_{rank}.pt"
            )
    with pytest.raises(CheckpointError, match="folder of its own"):
        ptbin.convert(str(tmp_path), str(tmp_path / "x.bin"))


def test_ranks_in_a_bucket_become_whole_there(tmp_path: Path, moto_s3: S3Endpoint) -> None:
    """Long pieces are copied inside the store, the rest passes through."""
    bucket = moto_s3.make_bucket()
    big = torch.arange(4 * 1024 * 1024, dtype=torch.float32).reshape(2048, 2048)
    small = torch.randn(3, 6)
    for rank in range(2):
        path = tmp_path / f"model_world_size_2_rank_{rank}.pt"
        cuts = {"w": (big, 0), "v": (small, 1)}
        state = {
            name: Cut(value.chunk(2, dim)[rank].clone(), tuple(value.shape), (2,), (rank,), (dim,))
            for name, (value, dim) in cuts.items()
        }
        save_as_old_torch(path, state, "2.3")
        moto_s3.store().write_bytes(f"{bucket}/in/actor/{path.name}", path.read_bytes())
    source, dest = f"s3://{bucket}/in", f"s3://{bucket}/out/actor.bin"
    options = moto_s3.storage_options
    found = [item.path for item in catalog.find_checkpoints(source, storage_options=options)]
    assert found == ["actor"]
    manifest = ptbin.convert(f"{source}/actor", dest, source_options=options, dest_options=options)
    data = moto_s3.store().read_bytes(f"{bucket}/out/actor.bin")
    whole = torch.load(io.BytesIO(data), weights_only=True)
    assert_same_tensors(whole, {"w": big, "v": small})
    assert manifest["bytes_copied_in_store"] >= big.nbytes // 2


@pytest.mark.parametrize(
    "name", ["model-rank={rank}.pt", "model.rank-{rank}-of-{world}.pt", "state_rank{rank:05d}.pth"]
)
def test_names_that_count_ranks_otherwise(tmp_path: Path, name: str) -> None:
    from torch.distributed.tensor import Shard

    whole = torch.arange(14.0).reshape(7, 2)
    cut_ranks(tmp_path / "in", (3,), {"w": (whole, [Shard(0)])}, name)
    ptbin.convert(tmp_path / "in", tmp_path / "x.bin")
    assert torch.load(tmp_path / "x.bin", weights_only=True)["w"].equal(whole)
    (tmp_path / "in" / name.format(rank=1, world=3)).unlink()
    with pytest.raises(IncompleteCheckpointError, match=r"not there: 1|pieces of 2"):
        ptbin.convert(tmp_path / "in", tmp_path / "y.bin")


def test_a_piece_whose_name_tells_nothing_says_how_to_bring_all_together(tmp_path: Path) -> None:
    from torch.distributed.tensor import Shard

    cut_ranks(tmp_path / "in", (2,), {"w": (torch.ones(4), [Shard(0)])}, "ckpt_{rank}.pt")
    with pytest.raises(IncompleteCheckpointError, match=r"into one folder as rank_0\.pt, rank_1\.pt"):
        ptbin.convert(tmp_path / "in" / "ckpt_1.pt", tmp_path / "x.bin")
