"""Megatron-LM's rules as rows of recipes: how its ranks' parts make a whole, and transformers' names for it.

Sources: the layers' `sharded_state_dict` in megatron/core (tensor_parallel/layers.py, extensions/
transformer_engine.py, transformer/mlp.py, transformer/moe/experts.py), `SelfAttention` for the rows of
`linear_qkv`; transformers' modeling files for the names. Values are Megatron's arguments by their own names
(`reading.containers.megatron`).
"""

from __future__ import annotations

from typing import Any

_Row = dict[str, Any]
_Steps = list[_Row]

_COLUMN = (
    "linear_qkv|linear_q|linear_kv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj"
    "|query_key_value|query|key_value|linear_fc1|dense_h_to_4h"
)
_ROW = r"linear_proj|linear_fc2|(?:self_|inter_)?attention\.dense|dense_4h_to_h"
_NUMBER = r"\d*"  # of an expert of a group: `linear_fc1.weight3`

_ANY = r"(?:.*\.)?"
_ENDS = rf"\.(?:weight|bias){_NUMBER}"


def _merge(names: str, how: str, **more: str) -> _Row:
    return {"names": _ANY + names, "how": how, **more}


_MERGES: list[_Row] = [
    _merge(r"word_embeddings(?:_for_head)?\.weight", "rows", cut="vocab_size"),
    _merge(r"(?:output_layer\.(?:weight|bias)|lm_head\.bias)", "rows", cut="vocab_size"),
    _merge(r"(?:linear_fc1|dense_h_to_4h)" + _ENDS, "gated", when="swiglu"),
    _merge(rf"(?:{_COLUMN}){_ENDS}", "rows"),
    _merge(rf"(?:{_ROW})\.weight{_NUMBER}", "columns"),
    _merge(rf"(?:{_ROW})\.bias{_NUMBER}", "equal"),
    _merge(r"eh_proj\.weight", "rows"),
    _merge(r"(?:\w*norm|pooler\.dense|lm_head\.dense|binary_head)\.(?:weight|bias)", "equal"),
    _merge(r"(?:layer_norm|rms_norm)_(?:weight|bias)", "equal"),
    _merge(r"(?:position|tokentype)_embeddings\.weight", "equal"),
    _merge(r"router\.(?:.*\.)?(?:weight|bias|expert_bias|local_tokens_per_expert)", "equal"),
    _merge(r"shared_experts\.gate_weight", "equal"),
    _merge(r"linear_(?:q|kv|qkv)_down_proj\.weight", "equal"),
    _merge(r"rotary_(?:pos_)?emb\.inv_freq", "equal"),
]

# -- transformers' names -------------------------------------------------------------------------------------

# Wrappers around the model: NeMo 2 saves `module.`, NeMo 1 `model.`.
_TOP = r"(?:(?:module|model)\.)*"
_GROUPED = ["num_query_groups", "num_attention_heads / num_query_groups + 2", "kv_channels"]
_PER_GROUP = "num_attention_heads / num_query_groups"


def _in_layers(below: str, to: str, *steps: _Row) -> list[_Row]:
    """A tensor of each layer: under its own name, or of all layers on the first axis of one."""
    target = "model.layers.{l}." + to
    return [
        {"from": rf"{_TOP}decoder\.layers\.(?P<l>\d+)\.{below}", "to": target, "steps": list(steps)},
        {"from": rf"{_TOP}decoder\.layers\.{below}", "to": target, "steps": [{"unstack": [0, "l"]}, *steps]},
    ]


def _rows_of_groups(first: int | str, count: int | str) -> _Steps:
    """Of each group of query heads, which has one key and one value head behind it, some heads' rows."""
    return [{"split": [0, _GROUPED]}, {"take": [1, first, count]}, {"flatten": [0, 2]}]


def _half(index: int) -> _Steps:
    """The gate's rows or the others': `swiglu` is 1 where there are both."""
    return [{"split": [0, ["1 + swiglu", -1]]}, {"take": [0, index, 1]}, {"flatten": [0, 1]}]


def _attention() -> list[_Row]:
    rows: list[_Row] = []
    heads: dict[str, tuple[int | str, int | str]] = {
        "q": (0, _PER_GROUP),
        "k": (_PER_GROUP, 1),
        "v": (_PER_GROUP + " + 1", 1),
    }
    for ending in ("weight", "bias"):
        for name, which in heads.items():
            below, to = rf"self_attention\.linear_qkv\.{ending}", f"self_attn.{name}_proj.{ending}"
            rows += _in_layers(below, to, *_rows_of_groups(*which))
        rows += _in_layers(rf"self_attention\.linear_proj\.{ending}", f"self_attn.o_proj.{ending}")
    for name in "qk":
        rows += _in_layers(rf"self_attention\.{name}_layernorm\.weight", f"self_attn.{name}_norm.weight")
    return rows


def _norms() -> list[_Row]:
    first = r"(?:input_layernorm\.weight|self_attention\.linear_qkv\.layer_norm_weight)"
    second = r"(?:pre_mlp_layernorm\.weight|mlp\.linear_fc1\.layer_norm_weight)"
    return [
        *_in_layers(first, "input_layernorm.weight"),
        *_in_layers(second, "post_attention_layernorm.weight"),
        {"from": _TOP + r"decoder\.final_layernorm\.weight", "to": "model.norm.weight"},
    ]


def _vocabulary() -> list[_Row]:
    cut: _Steps = [{"cut": [0, "vocab_size"]}]
    names = {r"embedding\.word_embeddings": "model.embed_tokens", "output_layer": "lm_head"}
    return [
        {"from": rf"{_TOP}{old}\.weight", "to": f"{new}.weight", "steps": cut} for old, new in names.items()
    ]


def _dense(below: str, to: str) -> list[_Row]:
    """A gated feed-forward layer: `below` and `to` stand before the names of its matrices."""
    rows: list[_Row] = []
    for ending in ("weight", "bias"):
        rows += _in_layers(rf"{below}linear_fc1\.{ending}", f"{to}gate_proj.{ending}", *_half(0))
        rows += _in_layers(rf"{below}linear_fc1\.{ending}", f"{to}up_proj.{ending}", *_half(1))
        rows += _in_layers(rf"{below}linear_fc2\.{ending}", f"{to}down_proj.{ending}")
    return rows


def _experts(to: str, gate: str, up: str, down: str) -> list[_Row]:
    """Experts: each under its own name, or all of a layer in one tensor."""
    rows: list[_Row] = []
    matrices: tuple[tuple[str, str, _Steps], ...] = (
        ("linear_fc1", gate, _half(0)),
        ("linear_fc1", up, _half(1)),
        ("linear_fc2", down, []),
    )
    for matrix, name, steps in matrices:
        target = f"{to}.experts.{{e}}.{name}.weight"
        each = rf"mlp\.experts\.(?:local_)?experts\.(?P<e>\d+)\.{matrix}\.weight"
        rows += _in_layers(each, target, *steps)
        rows += _in_layers(rf"mlp\.experts\.{matrix}\.weight(?P<e>\d+)", target, *steps)
        stacked: _Row = {"unstack": [0, "e"]}
        rows += _in_layers(rf"mlp\.experts\.experts\.{matrix}\.weight", target, stacked, *steps)
        rows += _in_layers(*_grouped(matrix, target), stacked, {"order": [1, 0]}, *steps)
    return rows


def _grouped(matrix: str, target: str) -> tuple[str, str, _Row, _Row]:
    """All experts as `GroupedMLP` saves them, as [experts, ...]: see `reading.containers.grouped_experts`."""
    number, sizes = ("1", ["hidden_size", -1]) if matrix == "linear_fc1" else ("2", [-1, "hidden_size"])
    split: _Row = {"split": [0, ["num_experts", *sizes]]}
    return rf"mlp\.experts\.weight{number}", target, {"flatten": [0, 1]}, split


_SCALING: _Row = {"from": r".*_extra_state", "to": None}
"""Of Transformer Engine, for its own 8-bit arithmetic."""

_BODY = [*_vocabulary(), *_attention(), *_norms(), _SCALING]

_QWEN_EXPERTS = [
    *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
    *_in_layers(r"mlp\.router\.weight", "mlp.gate.weight"),
    *_dense(r"mlp\.shared_experts\.", "mlp.shared_expert."),
    *_in_layers(r"mlp\.shared_experts\.gate_weight", "mlp.shared_expert_gate.weight"),
]
_MIXTRAL_EXPERTS = [
    *_experts("block_sparse_moe", "w1", "w3", "w2"),
    *_in_layers(r"mlp\.router\.weight", "block_sparse_moe.gate.weight"),
]
_DENSE = _dense(r"mlp\.", "mlp.")

MEGATRON_RECIPES: dict[str, tuple[str, _Row]] = {
    "megatron": ("Megatron-LM's mp_rank folders put together, their own names", {"merge": _MERGES}),
    "megatron-llama": (
        "Megatron-LM's checkpoints of a Llama or Mistral, under transformers' names",
        {"merge": _MERGES, "tensors": [*_BODY, *_DENSE]},
    ),
    "megatron-qwen": (
        "Megatron-LM's checkpoints of a Qwen 2, 2.5 or 3, dense or of experts, under transformers' names",
        {"merge": _MERGES, "tensors": [*_BODY, *_DENSE, *_QWEN_EXPERTS]},
    ),
    "megatron-mixtral": (
        "Megatron-LM's checkpoints of a Mixtral, under transformers' names",
        {"merge": _MERGES, "tensors": [*_BODY, *_MIXTRAL_EXPERTS]},
    ),
}
"""Name to what it does and the recipe."""
