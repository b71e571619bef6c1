"""Megatron-LM's checkpoints under transformers' names: the same weights, and the same computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin import ConvertOptions
from ptbin.errors import ModelMismatchError
from tests.bits import assert_same_tensors
from tests.checkpoints.megatron_files import Grid, Model, dist_entries, whole, write_dist, write_ranks

pytestmark = pytest.mark.filterwarnings("ignore")


def _converted(source: Path, dest: Path, recipe: str) -> dict[str, torch.Tensor]:
    ptbin.convert(str(source), str(dest), ConvertOptions(recipe=recipe, force=True))
    found: dict[str, torch.Tensor] = torch.load(dest, weights_only=True)
    return found


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


@pytest.mark.thorough
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


def test_a_recipe_for_another_model_is_refused(tmp_path: Path) -> None:
    model = Model()
    tensors = {**whole(model), "decoder.layers.0.input_layernorm.bias": torch.ones(16)}
    source = write_ranks(tmp_path / "in", model, tensors, Grid(tensor=2))
    with pytest.raises(ModelMismatchError, match=r"no rule for 1 tensors: .*input_layernorm\.bias"):
        _converted(source, tmp_path / "x.bin", "megatron-llama")
