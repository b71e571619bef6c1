"""Megatron's `GroupedMLP`: all experts of a rank in one matrix, whose shape does not say how they lie.

`weight1` is saved as [hidden, experts x columns] and lies as [experts, hidden, columns], `weight2` as
[experts x rows, hidden] and lies as [experts, rows, hidden] (megatron/core/transformer/moe/experts.py,
`GroupedMLP.forward`, up to 0.16). Parts of experts are put behind one another, those of one expert's ranks
along its columns or rows; gated columns are two blocks in each rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ptbin.merging.tiles import Part, require_plain
from ptbin.merging.views import View, concatenated, view_of
from ptbin.reading.containers.megatron import Sizes
from ptbin.reading.containers.part_files import PartFiles
from ptbin.values.tensors import TensorRef


def grouped_experts(
    files: PartFiles,
    name: str,
    parts: Mapping[tuple[int, int], Sequence[Part]],
    sizes: Sizes,
    facts: Mapping[str, int],
) -> TensorRef:
    """The matrix that one rank with all experts would have.

    Args:
        parts: by (expert-parallel rank, tensor-parallel rank of experts): every copy.

    Raises:
        IncompleteCheckpointError: a part is missing, they do not go together, an argument is not stated.
    """
    experts = facts.get("num_experts", 0)
    if sizes.expert == sizes.expert_tensor == 1:
        (only,) = parts.values()
        return only[0].tensor
    if not experts or experts % sizes.expert or "swiglu" not in facts:
        files.refuse(f"nothing says how many experts {name[:200]!r} holds, and whether they are gated")
    part = next(iter(parts.values()))[0]
    first = part.tensor
    rows = []
    for rank in range(sizes.expert):
        own = []
        for piece in range(sizes.expert_tensor):
            copies = parts.get((rank, piece))
            if copies is None:
                files.refuse(f"{name[:200]!r} of expert-parallel rank {rank} is in none of the files")
            require_plain(copies[0], name)
            if (copies[0].tensor.shape, copies[0].tensor.dtype) != (first.shape, first.dtype):
                files.refuse_unlike(name, part, copies[0])
            own.append(_experts(files, name, copies[0], experts // sizes.expert, gated=facts["swiglu"] != 0))
        rows.append(concatenated(own, 1 if name.endswith("2") else len(own[0].shape) - 1))
    whole = concatenated(rows, 0)
    height = first.shape[0] * (sizes.expert * sizes.expert_tensor if name.endswith("2") else 1)
    width = first.shape[1] * (1 if name.endswith("2") else sizes.expert * sizes.expert_tensor)
    tensor = replace(whole, final_shape=(height, width)).tensor(
        f"{files.uri}: {name[:200]!r}", name, files.known_storages
    )
    for group in parts.values():
        files.take_first(name, group, tensor.storage)
    return tensor


def _experts(files: PartFiles, name: str, part: Part, count: int, *, gated: bool) -> View:
    shape = part.tensor.shape
    axis = 0 if name.endswith("2") else 1
    if len(shape) != 2 or shape[axis] % (count * (2 if gated and axis else 1)):
        files.refuse(f"{part.home}: {name[:200]!r} is {list(shape)}, which is not {count} experts")
    extent = shape[axis] // count
    view = view_of(part.tensor, part.home)
    if axis == 0:
        return view.reshaped((count, extent, shape[1]))
    blocks = (2, extent // 2) if gated else (extent,)
    return view.reshaped((count, shape[0], *blocks))
