"""Megatron-LM's checkpoints: the files of all ranks become whole, and get transformers' names."""

from __future__ import annotations

import argparse
import io
import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import ptbin
import tests.checkpoints
from ptbin import ConvertOptions, catalog
from ptbin.errors import CheckpointError, IncompleteCheckpointError
from ptbin.reading.containers.megatron import megatron_facts
from ptbin.values.nodes import DictNode
from tests.bits import assert_same_tensors
from tests.checkpoints.megatron_core import CASES, VOCABULARY
from tests.checkpoints.megatron_files import (
    Grid,
    Model,
    dist_entries,
    made_by_megatron,
    whole,
    write_dist,
    write_ranks,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def _converted(source: Path, dest: Path, **options: Any) -> dict[str, torch.Tensor]:
    ptbin.convert(str(source), str(dest), ConvertOptions(**options, force=True))
    found: dict[str, torch.Tensor] = torch.load(dest, weights_only=True)
    return found


# -- every rank's part ---------------------------------------------------------------------------------------


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Model, Grid]:
    tensor, pipeline = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    virtual = draw(st.integers(1, 2)) if pipeline > 1 else 1
    counts = draw(st.lists(st.integers(0, 2), min_size=pipeline * virtual, max_size=pipeline * virtual))
    assume(sum(counts))
    kind = draw(st.sampled_from(["", "local", "grouped", "fused"]))
    expert = draw(st.sampled_from([1, 2, 4])) if kind else 1
    pieces = draw(st.sampled_from([n for n in (1, 2, 4) if tensor % n == 0])) if kind else tensor
    assume(expert * pieces >= tensor)  # or Megatron itself saves no file of some ranks
    flags = [draw(st.booleans()) for _ in range(3)]
    model = Model(
        layers=sum(counts),
        gated=flags[0],
        bias=flags[1],
        tied=flags[2],
        experts=4 if kind else 0,
        kind=kind or "local",
    )
    return model, Grid(tensor, pipeline, virtual, expert, pieces, tuple(counts))


@pytest.mark.thorough
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(case=_cases())
def test_any_cut_becomes_what_one_rank_saves(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Model, Grid]
) -> None:
    model, grid = case
    folder = tmp_path_factory.mktemp("ranks")
    tensors = whole(model)
    write_ranks(folder / "in", model, tensors, grid)
    found = _converted(folder / "in", folder / "x.bin", verify="none")
    assert_same_tensors(found, tensors)


GRID = Grid(tensor=2, pipeline=2)
MODEL = Model(tied=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_ranks(tmp_path / "iter_0000007", MODEL, whole(MODEL), GRID)


def test_a_folder_of_ranks_is_one_checkpoint(folder: Path, tmp_path: Path) -> None:
    found = [item.path for item in catalog.find_checkpoints(str(tmp_path)) if item.certain]
    assert found == ["iter_0000007"]
    manifest = ptbin.convert(str(folder), str(tmp_path / "x.bin"), ConvertOptions(verify="load"))
    assert manifest["source"]["container"] == "megatron_parts"
    assert manifest["accounting"]["left_out"].keys() == {
        *("optimizer", "random_state", "replica", "padding", "scaling_state")
    }
    assert ptbin.inspect(str(folder))["verdict"] == "safe"


def test_ranks_in_a_bucket_become_whole(tmp_path: Path) -> None:
    import fsspec

    folder = write_ranks(tmp_path / "in", MODEL, whole(MODEL), GRID)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/megatron/in", recursive=True)
    ptbin.convert("memory://megatron/in", "memory://megatron/x.bin")
    found = torch.load(io.BytesIO(memory.cat("/megatron/x.bin")), weights_only=True)
    memory.rm("/megatron", recursive=True)
    assert_same_tensors(found, whole(MODEL))


def test_parameters_that_are_views_of_one_buffer(folder: Path, tmp_path: Path) -> None:
    """So Megatron's distributed optimizer has them, each at a multiple of 64 elements."""

    def into_one_buffer(state: dict[str, Any]) -> None:
        model = {name: value for name, value in state["model"].items() if value.dtype == torch.bfloat16}
        starts = list(itertools.accumulate((-(-t.numel() // 64) * 64 for t in model.values()), initial=0))
        buffer = torch.full((starts[-1],), 7.0).bfloat16()
        for (name, tensor), start in zip(model.items(), starts[:-1], strict=True):
            view = buffer[start : start + tensor.numel()].view(tensor.shape)
            state["model"][name] = view.copy_(tensor)

    for path in folder.glob("*/*.pt"):
        _changed(path, into_one_buffer)
    assert_same_tensors(_converted(folder, tmp_path / "x.bin", verify="load"), whole(MODEL))


@pytest.mark.parametrize(("tag", "name"), [("7\n", "iter_0000007"), ("release", "release")])
def test_the_folder_above_means_its_last_iteration(tmp_path: Path, tag: str, name: str) -> None:
    write_ranks(tmp_path / "in" / name, MODEL, whole(MODEL), GRID)
    write_ranks(tmp_path / "in" / "iter_0000003", MODEL, whole(MODEL, seed=5), GRID)
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").write_text(tag)
    assert_same_tensors(_converted(tmp_path / "in", tmp_path / "x.bin"), whole(MODEL))


def test_weights_without_the_optimizer_and_of_one_rank(tmp_path: Path) -> None:
    model = Model()
    folder = write_ranks(tmp_path / "in", model, whole(model), Grid(), file="model_rng.pt")
    assert_same_tensors(_converted(folder, tmp_path / "x.bin"), whole(model))


def test_a_vocabulary_of_unknown_size_is_kept_with_its_padding(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "in", MODEL, whole(MODEL), GRID, tokenizer_type="NullTokenizer")
    found = _converted(folder, tmp_path / "x.bin")["embedding.word_embeddings.weight"]
    assert found.shape[0] == 16
    assert torch.equal(found[:10], whole(MODEL)["embedding.word_embeddings.weight"])


def _changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


FIRST, SECOND = "mp_rank_00_000/model_optim_rng.pt", "mp_rank_01_000/model_optim_rng.pt"
LAST = "mp_rank_01_001/model_optim_rng.pt"
NORM = "decoder.layers.0.input_layernorm.weight"


def _unequal(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / (LAST if name.startswith("output") else SECOND)
        _changed(path, lambda state: state["model"][name].add_(1))

    return damage


def _renamed(folder: Path) -> None:
    for name in (FIRST, SECOND):
        _changed(folder / name, lambda state: state["model"].update(mystery=torch.ones(3)))


def _without_a_layer(folder: Path) -> None:
    for name in (LAST, LAST.replace("_01_", "_00_")):
        _changed(
            folder / name,
            lambda state: [state["model"].pop(key) for key in list(state["model"]) if ".layers." in key],
        )


def _of_a_million_ranks(folder: Path) -> None:
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    for path in folder.glob("*/*.pt"):
        _changed(path, lambda state: vars(state["args"]).update(dict.fromkeys(sizes, 1 << 20)))


def _holds_itself(folder: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        state["model"].update({f"k{n}": state["model"] for n in range(40)})

    _changed(folder / FIRST, change)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "missing": (lambda folder: (folder / LAST).unlink(), "incomplete_checkpoint", LAST),
    "truncated": (
        lambda folder: (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-300]),
        "corrupt_archive",
        LAST,
    ),
    "another iteration": (
        lambda folder: _changed(folder / LAST, lambda state: state.update(iteration=8)),
        "incomplete_checkpoint",
        LAST,
    ),
    "another rank's name": (
        lambda folder: (folder / LAST).parent.rename(folder / "mp_rank_02_001"),
        "incomplete_checkpoint",
        "mp_rank_02_001",
    ),
    "sizes that no file has": (_of_a_million_ranks, "incomplete_checkpoint", "mp_rank_02_000"),
    "a model that holds itself": (_holds_itself, "incomplete_checkpoint", FIRST),
    "an average of the weights next to them": (
        lambda folder: _changed(folder / LAST, lambda state: state.update(teacher={"w": torch.ones(3)})),
        "ambiguous_state_dict",
        LAST,
    ),
    "another grid": (
        lambda folder: _changed(
            folder / LAST, lambda state: setattr(state["args"], "tensor_model_parallel_size", 4)
        ),
        "incomplete_checkpoint",
        LAST,
    ),
    "norms differ": (_unequal(NORM), "incomplete_checkpoint", SECOND),
    "tied embeddings differ": (_unequal("output_layer.weight"), "incomplete_checkpoint", LAST),
    "a name without a rule": (_renamed, "incomplete_checkpoint", "mystery"),
    "a tensor in one of two": (
        lambda folder: _changed(folder / SECOND, lambda state: state["model"].pop(NORM)),
        "incomplete_checkpoint",
        SECOND,
    ),
    "other sizes": (
        lambda folder: _changed(
            folder / SECOND,
            lambda state: state["model"].update(
                {"decoder.layers.0.mlp.linear_fc2.weight": torch.ones(16, 11).bfloat16()}
            ),
        ),
        "incomplete_checkpoint",
        SECOND,
    ),
    "a stage without its layers": (_without_a_layer, "incomplete_checkpoint", "the arguments say 2"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_go_together_is_refused_by_name(folder: Path, tmp_path: Path, damage: str) -> None:
    change, reason, named = DAMAGES[damage]
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        ptbin.convert(str(folder), str(tmp_path / "x.bin"))
    assert caught.value.reason == reason
    assert named in str(caught.value)
    assert not (tmp_path / "x.bin").exists()


def test_one_rank_is_not_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompleteCheckpointError, match="convert the folder"):
        ptbin.convert(str(folder / FIRST), str(tmp_path / "x.bin"))
    found = _converted(folder / FIRST, tmp_path / "x.bin", parts=True)
    assert found[NORM.replace("input_layernorm", "mlp.linear_fc2")].shape == (16, 12)


def test_gated_or_not_has_to_be_stated(tmp_path: Path) -> None:
    model = Model()
    folder = write_ranks(tmp_path / "in", model, whole(model), GRID)
    for path in folder.glob("*/*.pt"):
        _changed(path, lambda state: state.pop("args"))
    with pytest.raises(IncompleteCheckpointError, match="'swiglu'"):
        _converted(folder, tmp_path / "x.bin")
    told = '{"like": "megatron", "values": {"swiglu": 1, "vocab_size": 10}}'
    assert_same_tensors(_converted(folder, tmp_path / "x.bin", recipe=told), whole(model))


def _old(rank: int, stage: int) -> dict[str, Any]:
    """What Megatron saved of its models before megatron-core: mappings in mappings."""
    rows = torch.arange(24.0).reshape(6, 4)[rank * 3 : rank * 3 + 3].clone()
    columns = torch.arange(32.0).reshape(4, 8)[:, rank * 4 : rank * 4 + 4].clone()
    layer = {
        "layers.0.attention.query_key_value.weight": rows + stage,
        "layers.0.attention.dense.weight": columns + stage,
        "layers.0.attention.dense.bias": torch.full((4,), float(stage)),
        "layers.0.input_layernorm.weight": torch.full((4,), float(stage)),
    }
    model: dict[str, Any] = {"language_model": {"encoder": layer}}
    if stage == 0:
        model["language_model"]["embedding"] = {"word_embeddings": {"weight": rows}}
    else:
        layer["final_layernorm.weight"] = torch.ones(4)
        model["word_embeddings_for_head"] = {"weight": rows}
    args = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "num_layers": 2}
    return {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 7, "model": model}


def test_models_from_before_megatron_core(tmp_path: Path) -> None:
    for rank in range(2):
        for stage in range(2):
            path = tmp_path / "in" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            torch.save(_old(rank, stage), path)
    found = _converted(tmp_path / "in", tmp_path / "x.bin", flatten=True, select="model")
    rows, columns = torch.arange(24.0).reshape(6, 4), torch.arange(32.0).reshape(4, 8)
    above = "language_model.encoder."
    expected = {"language_model.embedding.word_embeddings.weight": rows}
    for layer in range(2):
        expected |= {
            f"{above}layers.{layer}.attention.query_key_value.weight": rows + layer,
            f"{above}layers.{layer}.attention.dense.weight": columns + layer,
            f"{above}layers.{layer}.attention.dense.bias": torch.full((4,), float(layer)),
            f"{above}layers.{layer}.input_layernorm.weight": torch.full((4,), float(layer)),
        }
    assert_same_tensors(found, {**expected, f"{above}final_layernorm.weight": torch.ones(4)})
    for path in (tmp_path / "in").glob("*/*.pt"):
        _changed(path, lambda state: state.pop("checkpoint_version"))
    with pytest.raises(IncompleteCheckpointError, match="checkpoint_version 0 or 1"):
        _converted(tmp_path / "in", tmp_path / "x.bin", flatten=True, select="model")


def test_nemos_ranks_state_their_sizes_in_its_configuration(tmp_path: Path) -> None:
    sizes = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "activation": "fast-swiglu",
        "num_layers": 2,
    }
    parts = write_ranks(tmp_path / "parts", MODEL, whole(MODEL), GRID)
    for path in parts.glob("*/*.pt"):
        state = torch.load(path, weights_only=False)
        rank, stage = path.parent.name.removeprefix("mp_rank_").split("_")
        dest = tmp_path / "in" / f"tp_rank_{rank}_pp_rank_{stage}" / "megatron_gpt.ckpt"
        dest.parent.mkdir(parents=True)
        config = {"cfg": {**sizes, "share_embeddings_and_output_weights": True}}
        torch.save({"state_dict": state["model"], "hyper_parameters": config, "global_step": 3}, dest)
    found = _converted(tmp_path / "in", tmp_path / "x.bin")
    embedding = found.pop("embedding.word_embeddings.weight")
    assert torch.equal(embedding[:10], whole(MODEL)["embedding.word_embeddings.weight"])
    assert_same_tensors(found, {k: v for k, v in whole(MODEL).items() if k in found})
    assert len(found) == len(whole(MODEL)) - 1


def test_facts_follow_from_arguments() -> None:
    def facts(**arguments: Any) -> dict[str, int]:
        known = {"tensor_model_parallel_size": 1, "num_attention_heads": 8, "hidden_size": 64}
        pairs = list((known | arguments).items())
        return megatron_facts(DictNode("dict", [("args", DictNode("dict", pairs))]))

    assert facts(num_query_groups=1, group_query_attention=False)["num_query_groups"] == 8
    assert facts(num_query_groups=2)["num_query_groups"] == 2
    assert (facts()["kv_channels"], facts(kv_channels=16)["kv_channels"]) == (8, 16)
    assert (facts()["swiglu"], facts(gated_linear_unit=True)["swiglu"]) == (0, 1)
    assert "swiglu" not in facts(swiglu=True, moe_mlp_glu_interleave_size=32)
    assert "vocab_size" not in facts(vocab_size=None)


# -- what megatron-core itself wrote ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    with tarfile.open(Path(tests.checkpoints.__file__).parent / "made" / "megatron_core.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_megatrons_own_ranks_become_what_one_rank_has(real: Path, tmp_path: Path, case: str) -> None:
    one = torch.load(real / f"{case}.pt", weights_only=True)
    cut = ("embedding.word_embeddings.weight", "output_layer.weight")
    expected = {name: tensor[:VOCABULARY] if name in cut else tensor for name, tensor in one.items()}
    found = _converted(real / case, tmp_path / "x.bin", verify="load")
    assert_same_tensors(found, expected)
    assert list(found) == list(expected)
    assert ptbin.inspect(str(real / case))["verdict"] == "safe"


@pytest.mark.parametrize("case", CASES)
def test_megatrons_own_torch_dist_holds_the_same_model(real: Path, tmp_path: Path, case: str) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = real / f"{case}_dist"
    dcp_to_torch_save(folder, tmp_path / "ref.pt")
    reference = torch.load(tmp_path / "ref.pt", weights_only=False)
    tensors = {name: value for name, value in reference.items() if isinstance(value, torch.Tensor)}
    assert_same_tensors(_converted(folder, tmp_path / "x.bin", verify="load"), tensors)
    found = [
        _converted(source, tmp_path / "x.bin", recipe="megatron-qwen") for source in (folder, real / case)
    ]
    assert_same_tensors(*found)
    assert ptbin.inspect(str(folder))["verdict"] == "safe"


# -- torch_dist ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("experts", [0, 4])
def test_torch_dist_is_what_torch_makes_of_it(tmp_path: Path, experts: int, *, stacked: bool) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model = Model(experts=experts)
    entries = dist_entries(model, whole(model), stacked=stacked)
    folder = write_dist(tmp_path / "iter_0000007", model, entries)
    dcp_to_torch_save(folder, tmp_path / "ref.pt")
    reference = torch.load(tmp_path / "ref.pt", weights_only=False)
    made_by_megatron(folder)
    manifest = ptbin.convert(str(folder), str(tmp_path / "x.bin"), ConvertOptions(verify="load"))
    found = torch.load(tmp_path / "x.bin", weights_only=True)
    assert_same_tensors(found, {name: reference[name] for name in entries})
    assert manifest["accounting"]["left_out"].keys() == {"optimizer", "random_state", "scaling_state"}
    assert ptbin.inspect(str(folder))["verdict"] == "safe"


def test_a_missing_file_of_a_torch_dist_folder_is_named(tmp_path: Path) -> None:
    folder = write_dist(tmp_path / "in", MODEL, dist_entries(MODEL, whole(MODEL)))
    (folder / "common.pt").write_bytes((folder / "common.pt").read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        _converted(folder, tmp_path / "x.bin")
    (folder / "common.pt").unlink()
    (folder / "__0_0.distcp").rename(folder / "__1_0.distcp")
    with pytest.raises(IncompleteCheckpointError, match=r"__0_0\.distcp"):
        _converted(folder, tmp_path / "x.bin")
