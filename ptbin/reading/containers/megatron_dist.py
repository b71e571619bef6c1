"""Megatron-LM's `torch_dist` folders: what its entries are besides the model's tensors. Pure.

Such a folder is one of torch.distributed.checkpoint (`reading.dcp`) whose names are Megatron's own: entries
of the optimizer begin with its name, and an object that each rank saves for itself ends in `/shard_...`
(megatron/core/dist_checkpointing/mapping.py, `ShardedObject.unique_key`; optimizer/distrib_optimizer.py).
What all ranks share lies in `common.pt`, or in an entry `common_state`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

from ptbin.sources.folders import COMMON_STATE
from ptbin.values.state_dict import Excluded

__all__ = ["is_torch_dist", "split_by_role"]

COMMON_ENTRY = "common_state"
_SHARD = "/shard_"

_ROLES = (
    (re.compile(r"(?:^|\.)_extra_state(?:/shard_.*)?$"), "scaling_state"),
    (re.compile(r"^(?:chained_\d+\.)*optimizer\."), "optimizer"),
    (re.compile(r"^rng_state(?:$|[./])"), "random_state"),
    (re.compile(r"^(?:rerun_state_machine\w*|dataloader_state|common_state)(?:$|[./])"), "trainer_state"),
    (re.compile(r"^(?:opt_param_scheduler|lr_scheduler)(?:$|[./])"), "scheduler"),
)


class Entry(Protocol):
    name: str


E = TypeVar("E", bound=Entry)


def is_torch_dist(files: Iterable[str], entries: Iterable[Entry]) -> bool:
    """Whether Megatron wrote the folder: by its files, or by names that only Megatron gives."""
    return COMMON_STATE in files or any(
        entry.name == COMMON_ENTRY or _SHARD in entry.name for entry in entries
    )


def split_by_role(values: list[tuple[E, Any]]) -> tuple[list[tuple[E, Any]], list[Excluded]]:
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
