"""Tensors that wrap others: a DTensor is its local tensor where that is all of it, the rest is opaque.

`torch._utils._rebuild_wrapper_subclass` makes a tensor without data; what it holds comes as its
state (torch/_tensor.py, `_reduce_ex_internal`). Of a DTensor that is `_local_tensor`, this rank's piece, and
`_spec`: mesh, placements, the whole's shape. Of a ShardedTensor it is a tuple that begins with the local
shards and the metadata of all shards (torch/distributed/_shard/sharded_tensor/api.py, `__getstate__`).
Knows no container, and not what a piece is worth (`parts`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ptbin.reading.pickle.meshes import Grids, attributes_of, grid_of
from ptbin.reading.tree import may_hold_data
from ptbin.values.nodes import DictNode, Global, Instance, Opaque
from ptbin.values.tensors import TensorRef

WRAPPER = "torch._utils._rebuild_wrapper_subclass"

DTENSOR = "DTensor"
SHARDED_TENSOR = "ShardedTensor"

_REASONS = {
    DTENSOR: "it is one rank's piece of a distributed tensor; merge the ranks, or save `full_tensor()`",
    SHARDED_TENSOR: "it is one rank's shards of a distributed tensor; merge the ranks' files",
}


def read_wrapper(args: tuple[Any, ...], state: Any, grids: Grids | None = None) -> Any:
    """The tensor that `args` of `_rebuild_wrapper_subclass` and its state make.

    A distributed tensor on one rank, or replicated on all, is its local tensor; any other one an `Opaque`
    that keeps both in `contents`. None where it is another wrapper.
    """
    kind = args[0] if args else None
    name = kind.name if isinstance(kind, Global) and kind.module.startswith("torch.distributed.") else ""
    if name not in _REASONS:
        return None
    opaque = Opaque(name, _REASONS[name], contents=(args, state))
    piece = piece_of(opaque, grids)
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


def piece_of(node: Any, grids: Grids | None = None) -> Piece | None:
    """The record as a piece of a distributed tensor; None where it is something else."""
    if not isinstance(node, Opaque) or node.kind not in _REASONS:
        return None
    args, state = node.contents
    local = local_tensor(node)
    if node.kind == SHARDED_TENSOR:
        metadata = attributes_of(state[1]) if isinstance(state, tuple) and len(state) > 1 else DictNode()
        shards = metadata.get("shards_metadata")
        ranks = len(shards) if isinstance(shards, (list, tuple)) else None
        return Piece(node.kind, ranks, ranks == 1 and _is_of_size(local, metadata.get("size")))
    spec = attributes_of(attributes_of(state).get("_spec"))
    mesh, placements = spec.get("mesh"), spec.get("placements")
    grid = grid_of(mesh) if grids is None else grids.of(mesh)
    ranks = math.prod(grid.shape) if grid is not None else None
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
        local = attributes_of(state).get("_local_tensor")
    else:
        shards = state[0] if isinstance(state, tuple) and state else None
        if not isinstance(shards, (list, tuple)) or len(shards) != 1:
            return None
        local = attributes_of(shards[0]).get("tensor")
    return local if isinstance(local, TensorRef) else None


def placement_of(state: Any) -> Any:
    """The mesh and placements in the state of a distributed tensor."""
    return attributes_of(state).get("_spec")


# Attributes of a tensor that exchange its content when they are set.
_CONTENT = frozenset(["data", "real", "imag", "_data", "grad_fn", "names"])


def wrapped_tensor(name: str, contents: Any) -> Opaque:
    """A tensor subclass around others (DTensor, optimum-quanto, torchao): `name` is its class."""
    library = name.partition(".")[0]
    unwrap = (
        "`full_tensor()`"
        if name.startswith("torch.distributed")
        else "its `dequantize()` or a plain `state_dict()`"
    )
    return Opaque(
        f"tensor of {name}",
        f"only code of {library} can unwrap it; load the checkpoint where {library} is installed and save "
        f"plain tensors ({unwrap})",
        contents=contents,
    )


def with_attributes(tensor: Any, state: Any, name: str) -> Any:
    """A tensor with the attributes that were set on it: those that hold data are kept, others fall away.

    Attributes that would exchange what the tensor holds make it one that only its own class understands.
    """
    parts = [part for part in (state if isinstance(state, tuple) else (state,)) if part is not None]
    if not parts:
        return tensor
    if not all(isinstance(part, DictNode) and _CONTENT.isdisjoint(part.by_name()) for part in parts):
        return wrapped_tensor(name, (tensor, state))
    pairs = [(str(key)[:200], value) for part in parts for key, value in part.pairs]
    # A bounded look, because what is not finished yet cannot be searched; `keys` asks again.
    holding = tuple((key, value) for key, value in pairs if may_hold_data(value))
    if not holding:
        return tensor
    if not isinstance(tensor, TensorRef):
        return wrapped_tensor(name, (tensor, state))
    return dataclasses.replace(tensor, attributes=holding)
