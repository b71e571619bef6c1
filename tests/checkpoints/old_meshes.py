"""DTensors in the form of torch 2.3, which this torch does not write: stand-ins that pickle as they did.

    save_as_torch_2_3(path, {"w": Cut(piece, (10, 3), grid=(2, 2), coordinate=(0, 1), shards=(0, None))})

The names and attributes are those of torch/distributed/_tensor/api.py, placement_types.py and device_mesh.py
of torch 2.3.1: a `mesh` tensor and `_coordinate_on_dim`, no layout and no map of ranks.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

__all__ = ["Cut", "save_as_torch_2_3"]

_CLASSES = {
    "torch.distributed._tensor.api": ("DTensor",),
    "torch.distributed._tensor.placement_types": (
        "DTensorSpec",
        "Replicate",
        "Shard",
        "TensorMeta",
        "_Partial",
    ),
    "torch.distributed.device_mesh": ("DeviceMesh",),
}


@dataclass
class Cut:
    """One rank's piece; `shards` has for each mesh dimension the dimension cut, None, or `"sum"`."""

    piece: torch.Tensor
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    coordinate: tuple[int, ...]
    shards: tuple[int | str | None, ...]


def _reduced(self: Any, protocol: int) -> Any:
    del protocol
    return self.reduced


@contextmanager
def _stand_ins() -> Iterator[dict[str, type]]:
    """The classes under the names they had, while it lasts."""
    made: dict[str, type] = {}
    modules = {}
    for module, names in _CLASSES.items():
        modules[module] = types.ModuleType(module)
        for name in names:
            made[name] = type(name, (), {"__module__": module})
            if name == "DTensor":
                made[name] = type(name, (), {"__module__": module, "__reduce_ex__": _reduced})
            setattr(modules[module], name, made[name])
    with mock.patch.dict(sys.modules, modules):
        yield made


def _with(kind: type, **attributes: Any) -> Any:
    found = kind()
    found.__dict__.update(attributes)
    return found


def save_as_torch_2_3(path: Path, state: Mapping[str, Cut | torch.Tensor]) -> None:
    """One rank's file."""
    with _stand_ins() as classes:
        meshes: dict[Any, Any] = {}
        content = {
            name: _distributed(value, classes, meshes) if isinstance(value, Cut) else value
            for name, value in state.items()
        }
        torch.save(content, path)


def _distributed(cut: Cut, classes: dict[str, type], meshes: dict[Any, Any]) -> Any:
    key = (cut.grid, cut.coordinate)
    if key not in meshes:
        ranks = torch.arange(torch.Size(cut.grid).numel(), dtype=torch.int32).reshape(cut.grid)
        meshes[key] = _with(
            classes["DeviceMesh"],
            device_type="cuda",
            mesh=ranks,
            mesh_dim_names=None,
            _flatten_mesh_list=tuple(ranks.flatten().tolist()),
            _hash=1,
            _coordinate_on_dim=list(cut.coordinate),
            _dim_group_infos=[("ptd:0", ranks.flatten().tolist(), "1")],
        )
    placements = tuple(
        _with(classes["Replicate"])
        if dim is None
        else _with(classes["_Partial"], reduce_op="sum")
        if dim == "sum"
        else _with(classes["Shard"], dim=dim)
        for dim in cut.shards
    )
    shape = torch.Size(cut.shape)
    strides = torch.empty(shape, device="meta").stride()
    meta = _with(classes["TensorMeta"], shape=shape, stride=strides, dtype=cut.piece.dtype)
    spec = _with(classes["DTensorSpec"], mesh=meshes[key], placements=placements, tensor_meta=meta)
    kind = classes["DTensor"]
    arguments = (kind, cut.piece.dtype, shape, strides, 0, torch.strided, torch.device("cuda:0"), False)
    slots = {"_local_tensor": cut.piece, "_spec": spec}
    rebuild = torch._utils._rebuild_wrapper_subclass
    reduced = (torch._tensor._rebuild_from_type_v2, (rebuild, kind, arguments, (None, slots)))
    return _with(kind, reduced=reduced)
