"""DeepSpeed's pipelines: a file for each layer and tensor-parallel rank, `layer_03-model_00-model_states.pt`.

Each is a flat state dict of its layer; names here are those of DeepSpeed's `PipelineModule`, the number of
the layer before the name (`3.attention.dense.weight`). `universal_checkpoint_info`, or the names of
GPT-NeoX and Bloom, say how tensor-parallel ranks make a whole (`rules`). Layers without weights may have no
file. That no layer is missing is shown by names in the model states (`param_shapes`), by the training
arguments' `num_layers` and where a known family keeps its layers, or by an optimizer that trains as much as
the layers hold; a folder of which nothing shows it is refused.

The optimizer's files belong to the checkpoint and are not opened: the weights are whole without them. Costs:
the index of each file, and small tensors that are summed over ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedFormatError
from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.deepspeed.models import leave_out_states, mapping_in
from ptbin.reading.containers.deepspeed.rules import (
    Rules,
    merge_ranks,
    merges_by_name,
    parallel_degree,
    rules_of,
)
from ptbin.reading.containers.merges import parts_by_name
from ptbin.reading.containers.part_files import PartFiles, mapping_of
from ptbin.sources.deepspeed_names import LAYER, MODEL_STATES, OPTIM_STATES
from ptbin.values.nodes import DictNode, entry_in
from ptbin.values.tensors import TensorRef

MAX_LAYERS = 1 << 16
MAX_SHOWN = 3
_RANK = re.compile(r"^model_(\d+)$")
# Which layers there are for `num_layers` blocks, by what only one family's blocks are called: the numbers
# before, of and behind the blocks (GPT-NeoX's gpt2_model.py, Megatron-DeepSpeed's gpt_model.py), and that of
# a head, which only models have whose embeddings are not tied.
_FAMILIES = (
    ("self_attention.query_key_value.weight", (1,), 3, 4, None),
    ("attention.query_key_value.weight", (0,), 2, 3, 4),
)


def read_deepspeed_layers(folder: Folder) -> Checkpoint:
    """Index the files of all layers; `module` is the model.

    Raises:
        IncompleteCheckpointError: a layer or a rank of it is missing, or of another save; nothing says how
            ranks make a whole.
        UnsupportedFormatError: layers cut over other ranks than tensor-parallel ones.
    """
    files = PartFiles(folder)
    reader = files.reader
    layers = _layers(files)
    count = max(rank for own in layers.values() for rank in own) + 1
    for layer, own in layers.items():
        absent = [rank for rank in range(count) if rank not in own]
        if absent:
            files.refuse_missing(_name_of(layer, absent[0], own))
    states = sorted(name for name in reader.names if MODEL_STATES.match(name))
    roots = [(name, mapping_in(files, name)) for name in states]
    _refuse_missing_stage(files, roots)
    held: dict[int, list[DictNode]] = {}
    for layer, own in layers.items():
        held[layer] = [mapping_in(files, own[rank]) for rank in range(count)]
    _refuse_missing(files, layers, held, [root for _, root in roots])
    rules = _rules(files, roots, held, folder.recipe)
    module = DictNode("OrderedDict")
    for layer, nodes in held.items():
        parts = [(layers[layer][rank], dict(node.pairs)) for rank, node in enumerate(nodes)]
        module.pairs.extend(_merged(files, layer, parts, rules))
    root = DictNode("dict", [("module", module)])
    if roots:
        root.pairs.extend((key, value) for key, value in roots[0][1].pairs if key != "module")
    for name, other in roots[1:]:
        leave_out_states(files, name, other)
    files.leave_out_unopened([name for name in reader.names if OPTIM_STATES.match(name)], "optimizer")
    return files.checkpoint("deepspeed_layers", root, preferred="module")


def _layers(files: PartFiles) -> dict[int, dict[int, str]]:
    """Layer to tensor-parallel rank to file name."""
    found: dict[int, dict[int, str]] = {}
    for name in files.reader.names:
        match = LAYER.match(name)
        if match is None:
            if "expert_" in name:
                files.refuse(
                    f"{name} is an expert of a layer of a pipeline, which ptbin does not put together"
                )
            continue
        rank = _RANK.match(match["axes"] or "model_00")
        if rank is None:
            raise UnsupportedFormatError(
                f"{files.uri}: {name} is cut over {match['axes']!r}, expected model_NN"
            )
        own = found.setdefault(int(match["layer"]), {})
        if own.setdefault(int(rank[1]), name) != name:
            raise CorruptArchiveError(f"{files.uri}: {own[int(rank[1])]} and {name} are of one rank")
    return dict(sorted(found.items()))


def _refuse_missing_stage(files: PartFiles, roots: list[tuple[str, DictNode]]) -> None:
    """Model states are there of every stage and rank, where they count them."""
    for name, root in roots:
        count = (parallel_degree(root, "pp_degree") or 0) * (parallel_degree(root, "tp_degree") or 0)
        if count <= 0:
            size = root.get("mp_world_size")
            count = size if type(size) is int else 0
        absent = [f"mp_rank_{n:02d}_model_states.pt" for n in range(min(count, MAX_LAYERS))]
        absent = [other for other in absent if other not in files.reader.names]
        if absent:
            files.refuse_missing(absent[0], f" of {count} that {name} counts")


def _name_of(layer: int, rank: int, like: dict[int, str] | None) -> str:
    is_bare = like and all("model_" not in name.partition("-")[2][:6] for name in like.values())
    axes = "" if is_bare else f"model_{rank:02d}-"
    return f"layer_{layer:02d}-{axes}model_states.pt"


def _refuse_missing(
    files: PartFiles,
    layers: dict[int, dict[int, str]],
    held: dict[int, list[DictNode]],
    roots: list[DictNode],
) -> None:
    """Refuse where a layer is known to be missing, or nothing shows that the first and the last are here."""
    some = next(iter(layers.values()))
    named = list(_named_layers(roots))
    of_family, head = _family_layers(roots, held)
    wanted = dict.fromkeys((*named, *of_family))
    missing = sorted(layer for layer in wanted if layer not in layers)
    if missing:
        files.refuse_missing(_name_of(missing[0], 0, some), f" ({len(missing)} layers in all)")
    trained, here = _trained(roots), _tensors_in(held)
    is_shown = named or trained in here or (of_family and (head is None or head in layers))
    if is_shown or files.folder.parts:
        return
    absent = [number for number in range(max(layers) + 2) if number not in layers]
    doubtful = " or ".join(_name_of(n, 0, some) for n in dict.fromkeys((*absent[:MAX_SHOWN], absent[-1])))
    if not roots:
        why = "the model states, mp_rank_00_model_states.pt, are missing"
    elif trained:
        why = f"the optimizer has {trained[1]} {trained[0]}, the layers {dict(here)[trained[0]]}"
    elif of_family:
        why = "nothing says whether the head is tied to the embedding"
    else:
        why = "neither the model states nor the training arguments name or count layers"
    files.refuse(
        f"nothing shows that these {len(layers)} layers are all ({why}): if {doubtful} is missing, fetch it; "
        "if these are all, take them with --parts"
    )


def _trained(roots: list[DictNode]) -> tuple[str, int] | None:
    """What the optimizers of all stages and ranks say of how much they train."""
    elements = parameters = 0
    for root in roots:
        optimizer = root.get("optimizer")
        flat, groups = entry_in(optimizer, "fp32_groups_flat"), entry_in(optimizer, "param_groups")
        if isinstance(flat, list) and all(isinstance(tensor, TensorRef) for tensor in flat):
            elements += sum(tensor.numel for tensor in flat)
        elif isinstance(groups, list):
            own = [group.get("params") for group in groups if isinstance(group, DictNode)]
            parameters += sum(len(numbers) for numbers in own if isinstance(numbers, list))
        else:
            return None
    if bool(elements) == bool(parameters):
        return None
    return ("elements", elements) if elements else ("parameters", parameters)


def _tensors_in(held: dict[int, list[DictNode]]) -> list[tuple[str, int]]:
    tensors = [
        value
        for nodes in held.values()
        for node in nodes
        for _, value in node.pairs
        if isinstance(value, TensorRef)
    ]
    return [("elements", sum(tensor.numel for tensor in tensors)), ("parameters", len(tensors))]


def _named_layers(roots: list[DictNode]) -> Iterator[int]:
    """Layers of which the model states name parameters."""
    for root in roots:
        groups = root.get("param_shapes")
        for group in groups if isinstance(groups, (list, tuple)) else ():
            for name, _ in group.pairs if isinstance(group, DictNode) else ():
                first = name.partition(".")[0] if type(name) is str else ""
                if first.isdecimal() and int(first) < MAX_LAYERS:
                    yield int(first)


def _family_layers(roots: list[DictNode], held: dict[int, list[DictNode]]) -> tuple[list[int], int | None]:
    """Layers of a family of models, told by the names of its blocks, and where a head would be.

    The training arguments count the blocks. Where they do not, there are as many as the layers behind them
    leave room for: one more than the last one here, or not.
    """
    for telling, before, first, behind, head in _FAMILIES:
        blocks = [layer for layer, nodes in held.items() if telling in nodes[0].by_name()]
        if blocks:
            least = max(blocks) - first + 1
            stated = _stated_count(roots)
            counts = [stated] if stated is not None else [least, least + 1]
            found = [[*before, *range(first, first + count), count + behind] for count in counts]
            heads = [None if head is None else count + head for count in counts]
            best = min(range(len(counts)), key=lambda n: len({*found[n]} ^ ({*held} - {heads[n]})))
            return found[best], heads[best]
    return [], None


def _stated_count(roots: list[DictNode]) -> int | None:
    for root in roots:
        for key in ("args", "neox_args"):
            arguments = mapping_of(root.get(key))
            count = arguments.get("num_layers") if arguments is not None else None
            if type(count) is int and 0 < count < MAX_LAYERS:
                return count
    return None


def _rules(
    files: PartFiles, roots: list[tuple[str, DictNode]], held: dict[int, list[DictNode]], recipe: str | None
) -> Rules:
    name, root = next(
        ((name, root) for name, root in roots if isinstance(root.get("universal_checkpoint_info"), DictNode)),
        roots[0] if roots else ("", DictNode()),
    )
    rules = rules_of(files, root, name, recipe)
    if rules.by_name and recipe is None:
        names = [f"{layer}.{key}" for layer, nodes in held.items() for key in nodes[0].by_name()]
        return Rules(rules.where, merges_by_name(names), by_name=True)
    return rules


def _merged(
    files: PartFiles, layer: int, states: list[tuple[str, dict[Any, Any]]], rules: Rules
) -> Iterator[tuple[str, Any]]:
    for key, value, parts in parts_by_name(files, states):
        whole = f"{layer}.{key}"
        if not parts:
            yield whole, value
            continue
        # The first and last layer may be one module, under whose name the rules know it.
        tied = f"tied_modules.embed.{key}"
        yield (
            whole,
            merge_ranks(files, tied if not rules.knows(whole) and rules.knows(tied) else whole, parts, rules),
        )
