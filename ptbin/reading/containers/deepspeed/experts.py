"""DeepSpeed mixtures of experts: the model's states, and a file for each expert of each layer.

A tag folder holds `mp_rank_<t>_model_states.pt`, whose `module` has all but the experts and whose
`num_experts` counts those of each layer, and `layer_<l>_expert_<e>_mp_rank_<t>_model_states.pt`, each a flat
state dict under the names that a model has whose experts all lie on one rank (deepspeed/runtime/engine.py,
`_save_moe_checkpoint`). Under ZeRO stages 1 and 2 these files are the same, and whole: the optimizer's files
(`expp_rank_<n>_...`, `zero_pp_rank_<n>_...`) belong to the checkpoint and are not opened.

Where there are several tensor-parallel ranks, an expert lies in one file, of whichever rank it was on, or in
one of each rank, slices or copies, as `enable_expert_tensor_parallelism` had it. Experts of AutoEP are rows
of fused weights (`auto_experts`). Costs: the index of each file that is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ptbin.errors import CorruptArchiveError, OutputCollisionError
from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.deepspeed.auto_experts import auto_layers_of, fused_experts
from ptbin.reading.containers.deepspeed.models import mapping_in
from ptbin.reading.containers.deepspeed.ranks import Ranks, merge_model_states, model_ranks
from ptbin.reading.containers.deepspeed.rules import merge_ranks
from ptbin.reading.containers.merges import parts_by_name
from ptbin.reading.containers.part_files import PartFiles, mapping_of
from ptbin.sources.deepspeed_names import EXPERT
from ptbin.values.nodes import DictNode

MAX_SHOWN = 5
_SLICED = "enable_expert_tensor_parallelism"

Expert = tuple[int, int]
"""Layer and number."""


def read_deepspeed_experts(folder: Folder) -> Checkpoint:
    """Index the folder; `module` is the model with its experts.

    Raises:
        IncompleteCheckpointError: experts are missing, or the model itself, or nothing says how the ranks'
            files of an expert make a whole.
        UnsupportedFormatError: experts of AutoEP that lie in ZeRO stage 3 partitions.
        CorruptArchiveError, OutputCollisionError: the files contradict each other.
    """
    files = PartFiles(folder)
    reader = files.reader
    found = _experts(files)
    names = model_ranks(files)
    if 0 not in names:
        files.refuse_missing("mp_rank_00_model_states.pt")
    ranks = merge_model_states(files, names)
    module: DictNode = ranks.root.get("module")
    layers = auto_layers_of(files, ranks.root)
    sliced = _is_sliced(ranks.root)
    _refuse_missing(files, ranks, found, sliced=sliced, is_auto=bool(layers))
    merged: dict[Expert, list[tuple[str, Any]]] = {}
    for expert, own in sorted(found.items()):
        merged[expert] = list(_merged(files, own, ranks, sliced=False if layers else sliced))
    home = dict.fromkeys(module.by_name(), ranks.names[0])
    pairs = fused_experts(files, layers, merged) if layers else _each(merged)
    for expert, (key, value) in pairs:
        name = next(iter(found[expert].values()))
        if key in home:
            raise OutputCollisionError(f"{reader.uri}: {key[:200]!r} is in {home[key]} and in {name}")
        home[key] = name
        module.pairs.append((key, value))
    optimizer = [name for name in reader.names if name.endswith("_optim_states.pt")]
    files.leave_out_unopened(optimizer, "optimizer")
    return files.checkpoint("deepspeed_experts", ranks.root, preferred="module")


def _experts(files: PartFiles) -> dict[Expert, dict[int, str]]:
    """Layer and expert to tensor-parallel rank to file name."""
    found: dict[Expert, dict[int, str]] = {}
    for name in files.reader.names:
        match = EXPERT.match(name)
        if match is None:
            continue
        if match["layer"] is None:
            files.refuse(
                f"{name} is of a DeepSpeed that did not count layers (before 0.6), so nothing says which "
                "experts there are"
            )
        found.setdefault((int(match["layer"]), int(match["expert"])), {})[int(match["mp"])] = name
    return found


def _is_sliced(root: DictNode) -> bool | None:
    """Whether experts were cut over tensor-parallel ranks, where the training arguments say."""
    for key in ("args", "ds_config"):
        arguments = mapping_of(root.get(key))
        stated = arguments.get(_SLICED) if arguments is not None else None
        if type(stated) is bool:
            return stated
    return None


def _refuse_missing(
    files: PartFiles, ranks: Ranks, found: dict[Expert, dict[int, str]], *, sliced: bool | None, is_auto: bool
) -> None:
    """Hold the files against `num_experts` and the ranks: the experts of each layer, in order."""
    name = ranks.names[0]
    counts = ranks.root.get("num_experts")
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 1 << 20 for n in counts):
        raise CorruptArchiveError(f"{files.uri}: {name} says in num_experts no numbers of experts")
    missing: list[str] = []
    for layer, count in enumerate(counts):
        for expert in range(count):
            if (layer, expert) not in found:
                missing.append(f"layer_{layer}_expert_{expert}_{name}")
            if len(missing) > MAX_SHOWN:  # whatever the file claims
                break
    # In one file each, or in one of each rank: files of some ranks are not all.
    several = any(len(own) > 1 for own in found.values()) or sliced is True
    for (layer, expert), own in sorted(found.items()):
        if several and len(missing) <= MAX_SHOWN:
            missing += [
                f"layer_{layer}_expert_{expert}_{other}"
                for n, other in enumerate(ranks.names)
                if n not in own
            ]
    if missing:
        shown = ", ".join(missing[:MAX_SHOWN]) + (", ..." if len(missing) > MAX_SHOWN else "")
        files.refuse(f"experts are missing: {shown}; fetch the folder again, whole")
    extra = [
        next(iter(own.values()))
        for (layer, expert), own in found.items()
        if layer >= len(counts) or expert >= counts[layer] or max(own) >= len(ranks.names)
    ]
    if extra:
        raise CorruptArchiveError(
            f"{files.uri}: {extra[0]} is of no layer, expert and rank that {name} counts; some files are of "
            "another save"
        )
    held = {rank for own in found.values() for rank in own}
    if len(ranks.names) > 1 and len(held) == 1 and not is_auto and sliced is None and not files.folder.parts:
        other = ranks.names[next(n for n in range(len(ranks.names)) if n not in held)]
        (layer, expert), _ = min(found.items())
        files.refuse(
            f"all experts are of tensor-parallel rank {held.pop()}, and nothing says that they are whole "
            f"({_SLICED}): if layer_{layer}_expert_{expert}_{other} and its like are missing, fetch them; if "
            "these are all, take them with --parts"
        )


def _each(merged: Mapping[Expert, Sequence[tuple[str, Any]]]) -> Iterator[tuple[Expert, tuple[str, Any]]]:
    for expert, pairs in merged.items():
        yield from ((expert, pair) for pair in pairs)


def _merged(
    files: PartFiles, own: dict[int, str], ranks: Ranks, *, sliced: bool | None
) -> Iterator[tuple[str, Any]]:
    """One expert's state dict, its ranks' files put together."""
    names = [own[rank] for rank in sorted(own)]
    states = [(name, dict(mapping_in(files, name).pairs)) for name in names]
    for key, value, parts in parts_by_name(files, states):
        if len(parts) < 2:
            yield key, value
        elif sliced is False:
            yield key, files.take_first(key, parts)
        elif sliced or files.folder.recipe is not None or ranks.rules.knows(key):
            yield key, merge_ranks(files, key, parts, ranks.rules)
        else:
            files.refuse(
                f"nothing says whether {key[:200]!r} is sliced over {', '.join(names[:3])} or copied "
                f"({_SLICED}); a recipe with a `merge` rule for it does (docs/parts.md)"
            )
