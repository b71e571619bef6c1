"""DeepSpeed mixtures of experts: the model's states, and a file for each expert of each layer.

A tag folder holds `mp_rank_00_model_states.pt`, whose `module` has all but the experts and whose
`num_experts` counts those of each layer, and `layer_<l>_expert_<e>_mp_rank_00_model_states.pt`, each a flat
state dict under the names that a model has whose experts all lie on one rank (deepspeed/runtime/engine.py,
`_save_moe_checkpoint`). Under ZeRO stages 1 and 2 these files are the same, and whole: the optimizer's files
(`expp_rank_<n>_...`, `zero_pp_rank_<n>_...`) belong to the checkpoint and are not opened. Costs: the index of
each file that is.
"""

from __future__ import annotations

from ptbin.errors import (
    CorruptArchiveError,
    IncompleteCheckpointError,
    OutputCollisionError,
    UnsupportedFormatError,
)
from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.deepspeed.models import mapping_in
from ptbin.reading.containers.part_files import PartFiles
from ptbin.sources.deepspeed_names import EXPERT, MODEL_STATES
from ptbin.stores.joined import JoinedReader
from ptbin.values.nodes import DictNode

__all__ = ["read_deepspeed_experts"]

MODEL = "mp_rank_00_model_states.pt"
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
        if (match := EXPERT.match(name)) is not None and match["layer"] is not None and int(match["mp"]) == 0
    }
    _refuse_other_ranks(reader)
    if MODEL not in reader.names:
        raise IncompleteCheckpointError(f"{reader.uri}: {MODEL} is missing; fetch the folder again, whole")
    files = PartFiles(folder)
    root = mapping_in(files, MODEL)
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
        for key, value in mapping_in(files, name).pairs:
            if not isinstance(key, str):
                raise CorruptArchiveError(f"{reader.uri}: {name} has a key that is not a name")
            if key in home:
                raise OutputCollisionError(f"{reader.uri}: {key[:200]!r} is in {home[key]} and in {name}")
            home[key] = name
            module.pairs.append((key, value))
    beside = [name for name in reader.names if name.endswith("_optim_states.pt")]
    files.leave_unopened(beside, "optimizer")
    return files.checkpoint("deepspeed_experts", root, preferred="module")


def _refuse_other_ranks(reader: JoinedReader) -> None:
    """Refuse experts of several tensor-parallel ranks, and those without a layer (before DeepSpeed 0.6)."""
    for name in reader.names:
        expert, states = EXPERT.match(name), MODEL_STATES.match(name)
        if expert is not None and (expert["layer"] is None or int(expert["mp"])):
            raise IncompleteCheckpointError(
                f"{reader.uri}: {name} is of tensor-parallel ranks, or of a DeepSpeed that did not "
                "count layers; "
                "ptbin puts experts of one tensor-parallel rank together"
            )
        if states is not None and (states["rank"] is not None or int(states["mp"])):
            raise IncompleteCheckpointError(
                f"{reader.uri}: {name} next to experts: parts of one checkpoint that ptbin does not "
                "put together"
            )


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
