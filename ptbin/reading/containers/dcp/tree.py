"""The state dict that a `torch.distributed.checkpoint` folder holds, in the shape that it was saved in.

Names are flattened in the index; paths put them back. What a trainer keeps flat next to the model's names
(torchtitan's optimizer, schedulers) is moved apart, told by what it holds.

In Megatron-LM's `torch_dist` folders entries of the optimizer begin with its name, and an object that each
rank saves for itself ends in `/shard_...` (megatron/core/dist_checkpointing/mapping.py,
`ShardedObject.unique_key`; optimizer/distrib_optimizer.py). What all ranks share lies in `common.pt`, or in
an entry `common_state`. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ptbin.errors import CorruptArchiveError
from ptbin.reading.containers.dcp.index import Entry
from ptbin.reading.tree import is_branch
from ptbin.sources.folders import COMMON_STATE
from ptbin.values.nodes import DictNode, iter_nodes
from ptbin.values.state_dict import Excluded
from ptbin.values.tensors import TensorRef

# An optimizer's or a scheduler's entry, flattened: told by what it holds, because a module of a model
# may be called `opt` or `optimal_transport`.
_STATE_NAMES = frozenset(
    """exp_avg exp_avg_sq max_exp_avg_sq exp_inf momentum_buffer square_avg grad_avg acc_delta
    exp_avg_res exp_avg_sq_row exp_avg_sq_col exp_avg_var previous_grad row_momentum col_momentum""".split()
)
_SCHEDULER_NAMES = frozenset("last_epoch _step_count base_lrs _last_lr _get_lr_called_within_step".split())
_OPTIMIZER_PREFIX = re.compile(r"^(?P<group>[^.]+)\.(?P<rest>(?:state|param_groups)\..+)$")
_NAMED_SO = re.compile(r"^(optim|opt$|opt_|lr_sched)", re.IGNORECASE)
_GROUP_NAMES = ("model", "state_dict", "model_state_dict", "weights")
# As in `selection`: whole numbers are counters and tables, bytes are random generators.
_COUNTERS = ("int64", "int32", "int16", "bool", "uint8")


COMMON_ENTRY = "common_state"
_SHARD = "/shard_"

_ROLES = (
    (re.compile(r"(?:^|\.)_extra_state(?:/shard_.*)?$"), "scaling_state"),
    (re.compile(r"^(?:chained_\d+\.)*optimizer\."), "optimizer"),
    (re.compile(r"^rng_state(?:$|[./])"), "random_state"),
    (re.compile(r"^(?:rerun_state_machine\w*|dataloader_state|common_state)(?:$|[./])"), "trainer_state"),
    (re.compile(r"^(?:opt_param_scheduler|lr_scheduler)(?:$|[./])"), "scheduler"),
)


def tree_of(uri: str, values: list[tuple[Entry, Any]]) -> DictNode:
    """The nested mapping that was saved, as the paths in the index have it; lists come back as lists."""
    root: dict[str | int, Any] = {}
    for entry, value in values:
        node = root
        for step in entry.path[:-1]:
            node = node.setdefault(step, {})
            if type(node) is not dict:
                raise CorruptArchiveError(f"{uri}: {entry.name[:200]!r} lies below a value, not a mapping")
        if entry.path[-1] in node:
            raise CorruptArchiveError(f"{uri}: the path of {entry.name[:200]!r} is taken")
        node[entry.path[-1]] = value
    return _gathered(DictNode("dict", [(key, _as_nodes(value)) for key, value in root.items()]))


def _as_nodes(value: Any) -> Any:
    if type(value) is not dict:
        return value
    if all(type(key) is int for key in value) and sorted(value) == list(range(len(value))):
        return [_as_nodes(value[index]) for index in range(len(value))]
    return DictNode("dict", [(key, _as_nodes(below)) for key, below in value.items()])


def _gathered(root: DictNode) -> DictNode:
    """The tree with a model's entries that lie flat next to other states moved into one mapping.

    torchtitan saves so: the model's own names, and among them `optimizer`, `lr_scheduler`, `dataloader`.
    Planners that keep no paths leave the optimizer's names flat as well.
    """
    groups: dict[str, DictNode] = {}
    flat: list[tuple[Any, Any]] = []
    for key, value in root.pairs:
        split = _split_optimizer_entry(key) if type(key) is str else None
        if split is None:
            flat.append((key, value))
        else:
            groups.setdefault(split[0], DictNode()).pairs.append((split[1], value))
    if groups.keys() & root.by_name().keys():
        return root
    pairs = [*flat, *groups.items()]
    weights = [
        key
        for key, v in flat
        if isinstance(v, TensorRef) and type(key) is str and v.dtype.name not in _COUNTERS
    ]
    branches = [(key, v) for key, v in pairs if is_branch(v) and not str(key).endswith("_extra_state")]
    seen: set[int] = set()
    other_models = any(not _is_optimizer(v) and _holds_weights(v, seen) for _, v in branches)
    # A single tensor next to a model that has its own mapping is not a model; dotted names are a module's.
    is_model = weights and (not other_models or any("." in key for key in weights))
    name = next((n for n in _GROUP_NAMES if root.get(n) is None), None)
    if not branches or not is_model or name is None:
        return DictNode("dict", pairs)
    model = [(key, v) for key, v in pairs if _belongs_to_model(key, v)]
    rest = [(key, v) for key, v in pairs if not _belongs_to_model(key, v)]
    return DictNode("dict", [(name, DictNode("dict", model)), *rest])


def _split_optimizer_entry(key: str) -> tuple[str, str] | None:
    """The optimizer's or scheduler's own name, and the entry's below it; None for what may be a model's.

    `optim.state.fc.weight.exp_avg` and `optim.param_groups.fc.weight.lr` (torch's flattened form), and
    `optim.fc.weight.exp_avg`, where the first name has to be an optimizer's as well.
    """
    first, dot, rest = key.partition(".")
    last = key.rpartition(".")[2]
    if not dot:
        return None
    if first in ("state", "param_groups"):
        is_state = first == "param_groups" or last in _STATE_NAMES or last == "step"
        return ("optimizer", key) if is_state else None
    named_so = _NAMED_SO.match(first) is not None
    if _OPTIMIZER_PREFIX.match(key) and (named_so or last in _STATE_NAMES or last == "step"):
        return first, rest
    if named_so and (last in _STATE_NAMES or last in _SCHEDULER_NAMES or last in ("step", "param_groups")):
        return first, rest
    return None


def _is_optimizer(value: Any) -> bool:
    """Whether a mapping is an optimizer's state dict, by what it holds."""
    if not isinstance(value, DictNode):
        return False
    named = value.by_name()
    if {"state", "param_groups"} & named.keys() or _SCHEDULER_NAMES & named.keys():
        return True
    lasts = {name.rpartition(".")[2] for name in named}
    return bool(lasts & _STATE_NAMES) or any(_is_moments(below) for below in named.values())


def _is_moments(value: Any) -> bool:
    return isinstance(value, DictNode) and bool(value.by_name().keys() & _STATE_NAMES)


def _belongs_to_model(key: Any, value: Any) -> bool:
    if type(key) is not str:
        return False
    return (
        isinstance(value, TensorRef) or key.endswith("_extra_state") or ("." in key and not is_branch(value))
    )


def _holds_weights(value: Any, seen: set[int]) -> bool:
    tensors = (node for node in iter_nodes(value, seen) if isinstance(node, TensorRef))
    return any(tensor.dtype.name not in _COUNTERS for tensor in tensors)


def is_torch_dist(files: Iterable[str], entries: Iterable[Entry]) -> bool:
    """Whether Megatron wrote the folder: by its files, or by names that only Megatron gives."""
    return COMMON_STATE in files or any(
        entry.name == COMMON_ENTRY or _SHARD in entry.name for entry in entries
    )


def split_by_role(values: list[tuple[Entry, Any]]) -> tuple[list[tuple[Entry, Any]], list[Excluded]]:
    """The entries that may be the model's, and the others by role."""
    kept = []
    others: dict[str, list[Any]] = {}
    for entry, value in values:
        role = next((role for pattern, role in _ROLES if pattern.search(entry.name)), None)
        if role is None:
            kept.append((entry, value))
        else:
            others.setdefault(role, []).append(value)
    return kept, [Excluded(role, role, node=found) for role, found in others.items()]
