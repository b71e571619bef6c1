"""Tensors that wrap others: a DTensor is its local tensor where that is all of it, the rest is opaque.

`torch._utils._rebuild_wrapper_subclass` makes a tensor without data of its own; what it holds comes as its
state (torch/_tensor.py, `_reduce_ex_internal`). Of a DTensor that is `_local_tensor`, this rank's piece, and
`_spec`: mesh, placements, the whole's shape. Of a ShardedTensor it is a tuple that begins with the local
shards and the metadata of all shards (torch/distributed/_shard/sharded_tensor/api.py, `__getstate__`).
Knows no container, and not what a piece is worth (`parts`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ptbin.nodes import DictNode, Global, Instance, Opaque
from ptbin.tensors import TensorRef

__all__ = ["WRAPPER", "Piece", "local_tensor", "piece_of", "placement_of", "read_wrapper"]

WRAPPER = "torch._utils._rebuild_wrapper_subclass"

DTENSOR = "DTensor"
SHARDED_TENSOR = "ShardedTensor"

_REASONS = {
    DTENSOR: "it is one rank's piece of a distributed tensor; merge the ranks, or save `full_tensor()`",
    SHARDED_TENSOR: "it is one rank's shards of a distributed tensor; merge the ranks' files",
}


def read_wrapper(args: tuple[Any, ...], state: Any) -> Any:
    """The tensor that `args` of `_rebuild_wrapper_subclass` and its state make.

    A distributed tensor on one rank, or replicated on all, is its local tensor; any other one an `Opaque`
    that keeps both in `contents`. None where it is another wrapper.
    """
    kind = args[0] if args else None
    name = kind.name if isinstance(kind, Global) and kind.module.startswith("torch.distributed.") else ""
    if name not in _REASONS:
        return None
    opaque = Opaque(name, _REASONS[name], contents=(args, state))
    piece = piece_of(opaque)
    return local_tensor(opaque) if piece is not None and piece.is_whole else opaque


@dataclass(frozen=True, slots=True)
class Piece:
    """What a distributed tensor says of itself.

    Attributes:
        ranks: processes that it lies on; None where the file does not say.
        is_whole: whether the local tensor is all of it.
    """

    kind: str
    ranks: int | None
    is_whole: bool


def piece_of(node: Any) -> Piece | None:
    """The record as a piece of a distributed tensor; None where it is something else."""
    if not isinstance(node, Opaque) or node.kind not in _REASONS:
        return None
    args, state = node.contents
    local = local_tensor(node)
    if node.kind == SHARDED_TENSOR:
        metadata = _attributes(state[1]) if isinstance(state, tuple) and len(state) > 1 else DictNode()
        shards = metadata.get("shards_metadata")
        ranks = len(shards) if isinstance(shards, (list, tuple)) else None
        return Piece(node.kind, ranks, ranks == 1 and _is_of_size(local, metadata.get("size")))
    spec = _attributes(_attributes(state).get("_spec"))
    ranks, placements = _mesh_size(spec.get("mesh")), spec.get("placements")
    found = placements if isinstance(placements, (tuple, list)) else ()
    names = [p.class_path.rpartition(".")[2] if isinstance(p, Instance) else "?" for p in found]
    exact = bool(names) and (
        all(name == "Replicate" for name in names)
        or (ranks == 1 and all(name in ("Replicate", "Shard", "_StridedShard") for name in names))
    )
    return Piece(node.kind, ranks, exact and _is_of_size(local, args[2] if len(args) > 2 else None))


def _is_of_size(local: TensorRef | None, size: Any) -> bool:
    return local is not None and isinstance(size, (tuple, list)) and tuple(size) == local.shape


def local_tensor(node: Opaque) -> TensorRef | None:
    """This rank's own tensor, where it is a single one."""
    _, state = node.contents
    if node.kind == DTENSOR:
        local = _attributes(state).get("_local_tensor")
    else:
        shards = state[0] if isinstance(state, tuple) and state else None
        if not isinstance(shards, (list, tuple)) or len(shards) != 1:
            return None
        local = _attributes(shards[0]).get("tensor")
    return local if isinstance(local, TensorRef) else None


def placement_of(state: Any) -> Any:
    """What a distributed tensor's state holds besides data: its mesh and placements."""
    return _attributes(state).get("_spec")


def _attributes(value: Any) -> DictNode:
    """Of a record or a state: `(None, mapping)` is how classes with slots are pickled (copyreg)."""
    state = value.state if isinstance(value, Instance) else value
    if isinstance(state, tuple) and len(state) == 2:
        state = next((part for part in state if isinstance(part, DictNode)), None)
    return state if isinstance(state, DictNode) else DictNode()


def _mesh_size(mesh: Any) -> int | None:
    """Processes of a DeviceMesh, or of the slice that this is: `_layout` in newer torch, `mesh` before."""
    attributes = _attributes(mesh)
    layout = _attributes(attributes.get("_layout"))
    axes = layout.get("axes")
    shapes: list[Any] = []
    if isinstance(axes, (tuple, list)):
        shapes = [_attributes(axis).get("shape") for axis in axes]
    elif layout.get("shape") is not None:
        shapes = [layout.get("shape")]
    if shapes:
        return _product(shapes)
    for name in ("mesh", "_mesh", "_rank_map"):
        tensor = attributes.get(name)
        if isinstance(tensor, TensorRef):
            return math.prod(tensor.shape)
    return None


def _product(value: Any) -> int | None:
    """Of all whole numbers in nested tuples."""
    if type(value) is int:
        return value if 0 < value < 1 << 32 else None
    if not isinstance(value, (tuple, list)) or len(value) > 64:
        return None
    found = [_product(item) for item in value]
    return None if None in found else math.prod(n for n in found if n is not None)
