"""The recipes that come with ptbin, one row each.

Sources: transformers' `convert_llama_weights_to_hf.py` (which parts of Meta's files are rows, which columns,
and the permutation of the rows of `wq` and `wk`), transformers 5's `conversion_mapping.py` (fused experts).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from ptbin.errors import UsageError
from ptbin.merging.megatron import MEGATRON_RECIPES
from ptbin.merging.recipes import Recipe, parse_recipe

_META_MERGES = [
    {"names": r".*\.attention\.w[kv]\.weight", "how": "rows", "heads": "n_kv_heads"},
    {"names": r".*\.(attention\.wq|feed_forward\.w[13])\.weight|output\.weight", "how": "rows"},
    {"names": r".*\.(attention\.wo|feed_forward\.w2)\.weight", "how": "columns"},
    # rows of the vocabulary since Llama 3, columns before
    {"names": r"tok_embeddings\.weight", "how": "to dim"},
    {"names": r".*norm\.weight|rope\.freqs", "how": "equal"},
]

_LAYER = r"layers\.(\d+)\."
_HF_LAYER = "model.layers.{1}."


def _halves_of_heads(heads: str) -> list[dict[str, Any]]:
    """Rows of each head from pairs (Meta's rotation) to halves (transformers')."""
    return [{"split": [0, [heads, -1, 2]]}, {"order": [0, 2, 1, 3]}, {"flatten": [0, 2]}]


def _renamed(pairs: dict[str, str]) -> list[dict[str, Any]]:
    return [{"from": old, "to": new} for old, new in pairs.items()]


_LLAMA_HF = [
    {
        "from": _LAYER + r"attention\.wq\.weight",
        "to": _HF_LAYER + "self_attn.q_proj.weight",
        "steps": _halves_of_heads("n_heads"),
    },
    {
        "from": _LAYER + r"attention\.wk\.weight",
        "to": _HF_LAYER + "self_attn.k_proj.weight",
        "steps": _halves_of_heads("n_kv_heads"),
    },
    *_renamed(
        {
            _LAYER + r"attention\.wv\.weight": _HF_LAYER + "self_attn.v_proj.weight",
            _LAYER + r"attention\.wo\.weight": _HF_LAYER + "self_attn.o_proj.weight",
            _LAYER + r"feed_forward\.w1\.weight": _HF_LAYER + "mlp.gate_proj.weight",
            _LAYER + r"feed_forward\.w2\.weight": _HF_LAYER + "mlp.down_proj.weight",
            _LAYER + r"feed_forward\.w3\.weight": _HF_LAYER + "mlp.up_proj.weight",
            _LAYER + r"attention_norm\.weight": _HF_LAYER + "input_layernorm.weight",
            _LAYER + r"ffn_norm\.weight": _HF_LAYER + "post_attention_layernorm.weight",
            r"tok_embeddings\.weight": "model.embed_tokens.weight",
            r"norm\.weight": "model.norm.weight",
            r"output\.weight": "lm_head.weight",
        }
    ),
    {"from": r"rope\.freqs", "to": None},
]

# Layers of a pipeline, counted over all that it does: GPT-NeoX has the embedding first and something without
# weights behind it, Bloom one without weights before it as well (tools/ckpts/convert_neox_to_hf.py,
# transformers' convert_bloom_original_checkpoint_to_pytorch.py).
_LAYERS_MERGES = [
    {"names": r".*(word_embeddings|final_linear)\.weight", "how": "rows"},
    {"names": r".*(attention\.query_key_value|mlp\.dense_h_to_4h|mlp\.w[13])\.(weight|bias)", "how": "rows"},
    {"names": r".*(attention\.dense|mlp\.dense_4h_to_h|mlp\.w2)\.weight", "how": "columns"},
    {"names": r".*norm\.(weight|bias|scale)", "how": "mean"},
    {"names": r".*rotary_emb\.inv_freq|.*attention\.(bias|masked_bias)", "how": "equal"},
]
_ROW_BIASES = r".*(attention\.dense|mlp\.dense_4h_to_h)\.bias"
_NEOX_MERGES = [*_LAYERS_MERGES, {"names": _ROW_BIASES, "how": "sum"}]
_BLOOM_MERGES = [*_LAYERS_MERGES, {"names": _ROW_BIASES + r"|\d+\.(weight|bias)", "how": "mean"}]

_NORMS = "input_layernorm|post_attention_layernorm"
_BLOCK = r"(?:sequential\.)?(?P<n>\d+)\."
_NEOX_HF = [
    {"from": _BLOCK + r"attention\.(?:rotary_emb\.inv_freq|bias|masked_bias)", "to": None},
    *_renamed(
        {
            _BLOCK + r"word_embeddings\.weight": "gpt_neox.embed_in.weight",
            _BLOCK + r"(?P<rest>(?:attention\.(?:query_key_value|dense)|mlp|" + _NORMS + r")\..+)": (
                "gpt_neox.layers.{n - 2}.{rest}"
            ),
            _BLOCK + r"norm\.(?P<what>weight|bias)": "gpt_neox.final_layer_norm.{what}",
            _BLOCK + r"final_linear\.weight": "embed_out.weight",
        }
    ),
]
_BLOOM_HF = _renamed(
    {
        _BLOCK + r"word_embeddings\.weight": "word_embeddings.weight",
        _BLOCK + r"word_embeddings\.norm\.(?P<what>weight|bias)": "word_embeddings_layernorm.{what}",
        _BLOCK + r"(?P<rest>(?:self_attention|mlp|" + _NORMS + r")\..+)": "h.{n - 3}.{rest}",
        _BLOCK + r"(?P<what>weight|bias)": "ln_f.{what}",
    }
)

_EXPERT = r"(?P<mlp>.+)\.experts\.(?P<e>\d+)\."
_MIXTRAL = r"(?P<layer>.+)\.block_sparse_moe\.experts\.(?P<e>\d+)\."


def _fused(pattern: str, names: Sequence[str], to: str) -> list[dict[str, Any]]:
    """Experts on a new first axis; the rows of `up` behind those of `gate`."""
    gate, up, down = (pattern + name + r"\.weight" for name in names)
    return [
        {"from": [gate, up], "to": f"{to}.experts.gate_up_proj", "stack": "e", "concat": 1},
        {"from": down, "to": f"{to}.experts.down_proj", "stack": "e"},
    ]


def _unfused(above: str, to: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Each expert by itself, its first half of rows and its second."""
    gate, up, down = (f"{to}.experts.{{e}}.{name}.weight" for name in names)

    def half(index: int) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = [
            {"unstack": [0, "e"]},
            {"split": [0, [2, -1]]},
            {"take": [0, index, 1]},
        ]
        return [*steps, {"flatten": [0, 1]}]

    fused = above + r"\.experts\."
    return [
        {"from": fused + "gate_up_proj", "to": gate, "steps": half(0)},
        {"from": fused + "gate_up_proj", "to": up, "steps": half(1)},
        {"from": fused + "down_proj", "to": down, "steps": [{"unstack": [0, "e"]}]},
    ]


SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-meta": ("Meta's consolidated.NN.pth put together, their own names", {"merge": _META_MERGES}),
    "llama-hf": (
        "Meta's consolidated.NN.pth put together, under transformers' names",
        {"merge": _META_MERGES, "tensors": _LLAMA_HF},
    ),
    "neox-layers": ("GPT-NeoX's tensor-parallel ranks put together, its own names", {"merge": _NEOX_MERGES}),
    "neox-hf": (
        "GPT-NeoX's layers or ranks put together, under transformers' names",
        {"merge": _NEOX_MERGES, "tensors": _NEOX_HF},
    ),
    "bloom-layers": ("Bloom's tensor-parallel ranks put together, its own names", {"merge": _BLOOM_MERGES}),
    "bloom-hf": (
        "Bloom's layers put together, under transformers' names",
        {"merge": _BLOOM_MERGES, "tensors": _BLOOM_HF},
    ),
    "moe-fuse": (
        "one tensor per expert (transformers 4, vLLM) to fused experts (transformers 5)",
        {
            "tensors": [
                *_fused(_EXPERT, ("gate_proj", "up_proj", "down_proj"), "{mlp}"),
                *_fused(_MIXTRAL, ("w1", "w3", "w2"), "{layer}.mlp"),
                {
                    "from": r"(?P<layer>.+)\.block_sparse_moe\.(?P<rest>(?!experts\.).+)",
                    "to": "{layer}.mlp.{rest}",
                },
            ],
            "others": "keep",
        },
    ),
    "moe-split": (
        "fused experts (transformers 5) to one tensor per expert (transformers 4, vLLM)",
        {
            "tensors": _unfused(r"(?P<mlp>.+)", "{mlp}", ("gate_proj", "up_proj", "down_proj")),
            "others": "keep",
        },
    ),
    "moe-split-mixtral": (
        "fused experts of a Mixtral (transformers 5) to its own names (transformers 4, vLLM)",
        {
            "tensors": [
                *_unfused(r"(?P<layer>.+)\.mlp", "{layer}.block_sparse_moe", ("w1", "w3", "w2")),
                {
                    "from": r"(?P<layer>.+)\.mlp\.(?P<rest>(?!experts\.).+)",
                    "to": "{layer}.block_sparse_moe.{rest}",
                },
            ],
            "others": "keep",
        },
    ),
    **MEGATRON_RECIPES,
}
"""Name to what it does and the recipe."""


@cache
def find_recipe(text: str) -> Recipe:
    """A shipped recipe by its name, or one in JSON.

    Raises:
        UsageError: neither.
    """
    if text.lstrip().startswith("{"):
        return parse_recipe(_completed(text))
    if text not in SHIPPED:
        raise UsageError(
            f"recipe: {text[:200]!r} is neither one of {', '.join(SHIPPED)} nor a recipe in JSON; of a file, "
            "give the content"
        )
    return parse_recipe(json.dumps({"name": text, **SHIPPED[text][1]}))


def _completed(text: str) -> str:
    """A recipe that is `like` a shipped one, with the rows of that one where it has no rows itself."""
    try:
        own = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(own, dict) or "like" not in own:
        return text
    like = own.pop("like")
    if not isinstance(like, str) or like not in SHIPPED:
        raise UsageError(f"recipe: `like` {str(like)[:200]!r} is not one of {', '.join(SHIPPED)}")
    row = SHIPPED[like][1]
    values = own.get("values", {})
    if isinstance(values, dict):
        own["values"] = {**row.get("values", {}), **values}
    return json.dumps({"name": like, **row, **own})
