"""DeepSpeed mixtures of experts without ZeRO: the model's states, and a file for each expert of each layer.

A tag folder holds `mp_rank_00_model_states.pt`, whose `module` has all but the experts and whose
`num_experts` counts those of each layer, and `layer_<l>_expert_<e>_mp_rank_00_model_states.pt`, each a flat
state dict under the names that a model has whose experts all lie on one rank (deepspeed/runtime/engine.py,
`_save_moe_checkpoint`). The optimizer's files (`expp_rank_<n>_...`) are companions and not read. Costs: the
index of each file.
"""

from __future__ import annotations

import re

from ptbin.errors import (
    CorruptArchiveError,
    IncompleteCheckpointError,
    OutputCollisionError,
    UnsupportedFormatError,
)
from ptbin.reading.containers.checkpoint import Checkpoint, Folder, Opening, read_part
from ptbin.stores.joined import JoinedReader
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import Storage

__all__ = ["read_deepspeed_experts"]

MODEL = "mp_rank_00_model_states.pt"
_EXPERT = re.compile(r"^layer_(?P<layer>\d+)_expert_(?P<expert>\d+)_mp_rank_00_model_states\.pt$")
MAX_SHOWN = 5


def read_deepspeed_experts(folder: Folder) -> Checkpoint:
    """Index the folder; `module` is the model with its experts.

    Raises:
        IncompleteCheckpointError: experts are missing, or the model itself.
        UnsupportedFormatError: experts that are slices of fused weights (AutoEP).
        CorruptArchiveError, OutputCollisionError: the files contradict each other.
    """
    reader = folder.reader
    found = {
        (int(match["layer"]), int(match["expert"])): name
        for name in reader.names
        if (match := _EXPERT.match(name)) is not None
    }
    if MODEL not in reader.names:
        raise IncompleteCheckpointError(f"{reader.uri}: {MODEL} is missing; fetch the folder again, whole")
    opening = folder.opening(MODEL)
    storages: dict[str, Storage] = {}
    root = _open(reader, MODEL, opening, storages)
    module = root.get("module")
    if not isinstance(module, DictNode):
        raise CorruptArchiveError(f"{reader.uri}: {MODEL} holds no mapping `module`")
    if root.get("ds_autoep_layers") is not None:
        raise UnsupportedFormatError(
            f"{reader.uri}: experts of AutoEP are slices of fused weights; convert it with DeepSpeed's "
            "ds_to_universal.py"
        )
    _refuse_missing(reader.uri, root, found)
    home = dict.fromkeys(module.by_name(), MODEL)
    for _, name in sorted(found.items()):
        for key, value in _open(reader, name, opening, storages).pairs:
            if not isinstance(key, str):
                raise CorruptArchiveError(f"{reader.uri}: {name} has a key that is not a name")
            if key in home:
                raise OutputCollisionError(f"{reader.uri}: {key[:200]!r} is in {home[key]} and in {name}")
            home[key] = name
            module.pairs.append((key, value))
    return Checkpoint(
        reader.uri,
        reader.size,
        "deepspeed_experts",
        root,
        opening.programs,
        storages,
        opening.vocabulary,
        preferred="module",
    )


def _open(reader: JoinedReader, name: str, opening: Opening, storages: dict[str, Storage]) -> DictNode:
    checkpoint = read_part(reader, name, opening)
    storages.update({f"{name}/{key}": storage for key, storage in checkpoint.storages.items()})
    if not isinstance(checkpoint.root, DictNode):
        raise CorruptArchiveError(f"{reader.uri}: {name} holds no mapping")
    return checkpoint.root


def _refuse_missing(uri: str, root: DictNode, found: dict[tuple[int, int], str]) -> None:
    """Hold the files against `num_experts`: the experts of each layer, in order."""
    counts = root.get("num_experts")
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 1 << 20 for n in counts):
        raise CorruptArchiveError(f"{uri}: {MODEL} says in num_experts no numbers of experts")
    missing: list[str] = []
    for layer, count in enumerate(counts):
        for expert in range(count):
            if (layer, expert) not in found:
                missing.append(f"layer_{layer}_expert_{expert}_{MODEL}")
            if len(missing) > MAX_SHOWN:  # whatever the file claims
                break
    if missing:
        shown = ", ".join(missing[:MAX_SHOWN]) + (", ..." if len(missing) > MAX_SHOWN else "")
        raise IncompleteCheckpointError(f"{uri}: experts are missing: {shown}; fetch the folder again, whole")
    extra = [
        name for (layer, expert), name in found.items() if layer >= len(counts) or expert >= counts[layer]
    ]
    if extra:
        raise CorruptArchiveError(
            f"{uri}: {extra[0]} is of no layer and expert that {MODEL} counts; some files are of another save"
        )
