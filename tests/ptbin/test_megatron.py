"""Megatron-LM's checkpoints: the files of all ranks become whole, and get transformers' names."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import ptbin
from ptbin import ConvertOptions, catalog
from ptbin.errors import CheckpointError, IncompleteCheckpointError, ModelMismatchError
from ptbin.reading.containers.megatron import megatron_facts
from ptbin.values.nodes import DictNode
from tests.bits import assert_same_tensors
from tests.checkpoints.megatron import (
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


# -- transformers' names -------------------------------------------------------------------------------------


def _config(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 50,
        "tie_word_embeddings": kind == "qwen3",
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if kind == "llama":
        return transformers.LlamaConfig(**sizes)
    if kind == "qwen2":
        return transformers.Qwen2Config(**sizes)
    if kind == "qwen3":
        return transformers.Qwen3Config(**sizes, head_dim=16)
    if kind == "qwen2-moe":
        return transformers.Qwen2MoeConfig(**sizes, **experts, shared_expert_intermediate_size=32)
    if kind == "qwen3-moe":
        return transformers.Qwen3MoeConfig(**sizes, **experts, head_dim=8)
    return transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)


def _as_megatron(state: dict[str, torch.Tensor], groups: int) -> dict[str, torch.Tensor]:
    """transformers' model as one rank of Megatron would save it."""

    def put_together(above: str, ending: str) -> torch.Tensor:
        parts = [state[f"{above}{n}_proj.{ending}"] for n in "qkv"]
        rows = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(rows, 1).flatten(0, 1)

    top = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
        "lm_head.weight": "output_layer.weight",
    }
    names = {
        "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
        "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
        "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
        "mlp.down_proj.weight": "mlp.linear_fc2.weight",
        "mlp.gate.weight": "mlp.router.weight",
        "mlp.shared_expert.down_proj.weight": "mlp.shared_experts.linear_fc2.weight",
        "mlp.shared_expert_gate.weight": "mlp.shared_experts.gate_weight",
    }
    found = {}
    for name, tensor in state.items():
        if name in top:
            found[top[name]] = tensor
            continue
        number, below = name.removeprefix("model.layers.").split(".", 1)
        above, old = f"decoder.layers.{number}.", f"model.layers.{number}."
        if below in names:
            found[above + names[below]] = tensor
        elif below.startswith("self_attn.q_proj."):
            ending = below.rpartition(".")[2]
            found[f"{above}self_attention.linear_qkv.{ending}"] = put_together(f"{old}self_attn.", ending)
        elif below.endswith("gate_proj.weight"):
            up = state[name.replace("gate_proj", "up_proj")]
            new = below.replace("shared_expert.", "shared_experts.").replace("gate_proj", "linear_fc1")
            found[above + new] = torch.cat([tensor, up])
        elif below.startswith("mlp.experts."):
            matrix = "linear_fc2" if "down" in below else "linear_fc1"
            for expert, own in enumerate(tensor):
                found[f"{above}mlp.experts.local_experts.{expert}.{matrix}.weight"] = own
    return found


KINDS = {
    "llama": "megatron-llama",
    "qwen2": "megatron-qwen",
    "qwen3": "megatron-qwen",
    "qwen2-moe": "megatron-qwen",
    "qwen3-moe": "megatron-qwen",
    "mixtral": "megatron-mixtral",
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_with_what_a_recipe_makes(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = _config(kind)
    original = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = {
        k: v for k, v in original.state_dict().items() if not (k == "lm_head.weight" and kind == "qwen3")
    }
    is_moe = kind.endswith("moe") or kind == "mixtral"
    model = Model(
        width=64,
        hidden=48,
        vocabulary=50,
        tied=kind == "qwen3",
        experts=4 if is_moe else 0,
    )
    tensors = _as_megatron(state, 4)
    head = getattr(config, "head_dim", None) or 8
    grid = Grid(tensor=2, pipeline=2, expert=2 if is_moe else 1)
    sources = {
        "ranks": write_ranks(tmp_path / "ranks", model, tensors, grid, rotary_base=10000),
        "stacked": write_dist(tmp_path / "stacked", model, dist_entries(model, tensors)),
        "module": write_dist(
            tmp_path / "module", model, dist_entries(model, tensors, stacked=False), prefix="module."
        ),
    }
    recipe = f'{{"like": "{KINDS[kind]}", "values": {{"kv_channels": {head}}}}}'
    for source in sources.values():
        (source / "config.json").write_text(config.to_json_string())
        out = source.with_name(f"{source.name}-out")
        ptbin.convert(str(source), str(out / "pytorch_model.bin"), ConvertOptions(recipe=recipe, layout="hf"))
        read = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        assert_same_tensors(read.state_dict(), original.state_dict())
    tokens = torch.arange(11)[None]
    assert torch.equal(read(tokens).logits, original(tokens).logits)


def test_all_experts_in_one_matrix_get_a_name_each(tmp_path: Path) -> None:
    models = [Model(experts=4, kind=kind) for kind in ("fused", "local")]
    fused = whole(models[0])
    local = dict(fused)
    for layer in range(2):
        above = f"decoder.layers.{layer}.mlp.experts."
        first = local.pop(above + "weight1").view(4, 16, 48)
        second = local.pop(above + "weight2").view(4, 24, 16)
        for expert in range(4):
            local[f"{above}local_experts.{expert}.linear_fc1.weight"] = first[expert].T.contiguous()
            local[f"{above}local_experts.{expert}.linear_fc2.weight"] = second[expert].T.contiguous()
    grid = Grid(tensor=2, expert=2)
    found = [
        _converted(
            write_ranks(tmp_path / model.kind, model, tensors, grid), tmp_path / "x.bin", recipe=recipe
        )
        for model, tensors in zip(models, (fused, local), strict=True)
        for recipe in ["megatron-mixtral"]
    ]
    assert_same_tensors(*found)


def test_a_recipe_for_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    model = Model(bias=True)
    other = write_ranks(tmp_path / "in", model, whole(model), GRID)
    _changed(
        other / "mp_rank_00_000" / "model_optim_rng.pt",
        lambda state: state["model"].update({"decoder.layers.0.input_layernorm.bias": torch.ones(16)}),
    )
    _changed(
        other / "mp_rank_01_000" / "model_optim_rng.pt",
        lambda state: state["model"].update({"decoder.layers.0.input_layernorm.bias": torch.ones(16)}),
    )
    with pytest.raises(ModelMismatchError, match=r"no rule for 1 tensors: .*input_layernorm\.bias"):
        _converted(other, tmp_path / "x.bin", recipe="megatron-llama")
