"""Names of DeepSpeed's files in a tag folder, and which of them are one checkpoint. Pure.

Sources: deepspeed/runtime/engine.py (`_get_ckpt_name`, `_get_zero_ckpt_name`, `_get_expert_ckpt_name`,
`_get_optimizer_ckpt_name`), runtime/pipe/module.py (`ckpt_layer_path`), checkpoint/ds_to_universal.py, 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

OPTIM_STATES = re.compile(
    r"^(?P<kind>bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$"
)
MODEL_STATES = re.compile(r"^(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
# `axes` are the ranks of all parallelism but data and pipeline: `model_00`, mostly.
LAYER = re.compile(r"^layer_(?P<layer>\d+)-(?:(?P<axes>.+)-)?model_states\.pt$")
EXPERT = re.compile(
    r"^(?:layer_(?P<layer>\d+)_)?expert_(?P<expert>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt$"
)
_EXPERT_OPTIM = re.compile(r"^expp_rank_\d+_mp_rank_\d+_optim_states\.pt$")
UNIVERSAL = re.compile(r"^zero/(?P<name>[^/]+)/(?P<state>fp32|exp_avg|exp_avg_sq|step)\.pt$")
UNIVERSAL_OPTIMIZER = "zero/optimizer_state.pt"
_UNIVERSAL_PATH = re.compile(
    r"^(?:(?P<folder>.*)/)?(?P<name>zero/[^/]+/(?:fp32|exp_avg|exp_avg_sq|step)\.pt)$"
)


def is_universal_name(path: str) -> re.Match[str] | None:
    """The match of a path that a parameter of a universal checkpoint lies at: `folder` and `name` in it."""
    return _UNIVERSAL_PATH.match(path)


def deepspeed_checkpoint(names: Iterable[str]) -> tuple[str, list[str]]:
    """The kind of checkpoint that a folder's files are, and its members; an empty kind where they are none.

    `mp_rank_00_model_states.pt` by itself is a file like any other. Files of the optimizer that a kind does
    not read are members all the same: they belong to the checkpoint and are none by themselves.
    """
    everything = list(names)
    states = [name for name in everything if MODEL_STATES.match(name)]
    zero = [name for name in everything if OPTIM_STATES.match(name)]
    layers = [name for name in everything if LAYER.match(name)]
    experts = [name for name in everything if EXPERT.match(name)]
    universal = [name for name in everything if UNIVERSAL.match(name)]
    if any(name.endswith("/fp32.pt") for name in universal):
        beside = [name for name in everything if name == UNIVERSAL_OPTIMIZER]
        return "deepspeed_universal", [*universal, *beside, *states, *zero]
    if layers:
        return "deepspeed_layers", [*layers, *experts, *states, *zero]
    if experts:
        beside = [name for name in everything if _EXPERT_OPTIM.match(name)]
        return "deepspeed_experts", [*experts, *states, *zero, *beside]
    if zero:
        return "deepspeed_zero", [*zero, *states]
    if any(int(match["mp"]) > 0 for name in states if (match := MODEL_STATES.match(name))):
        return "deepspeed_ranks", states
    return "", []
