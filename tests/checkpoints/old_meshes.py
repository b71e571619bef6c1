"""DTensors in the forms of older torches, which this one does not write: stand-ins pickled as theirs.

    save_as_old_torch(path, {"w": Cut(piece, (10, 3), (2, 2), (0, 1), shards=(0, None))}, "2.3")

The names and attributes are those of the published sources. Torch 2.3 (distributed/_tensor/api.py,
placement_types.py, device_mesh.py) has a `mesh` tensor and `_coordinate_on_dim`, no layout and no map of
ranks; "2.4" the spec in `_tensor._dtensor_spec`; 2.5 to 2.8 the public module distributed.tensor and a mesh
with `_thread_id`; "2.9" (device_mesh.py on main, autumn of 2025) the mesh's `_layout` next to the tensor.
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

__all__ = ["OLD_TORCHES", "Cut", "save_as_old_torch"]

_PLACEMENTS = ("Replicate", "Shard", "_StridedShard")
_SPEC = ("DTensorSpec", "TensorMeta")
_MESH = {"torch.distributed.device_mesh": ("DeviceMesh",)}
_NEW = {
    "torch.distributed.tensor": ("DTensor",),
    "torch.distributed.tensor._dtensor_spec": _SPEC,
    "torch.distributed.tensor.placement_types": (*_PLACEMENTS, "Partial"),
    **_MESH,
}
_VERSIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "2.3": {
        "torch.distributed._tensor.api": ("DTensor",),
        "torch.distributed._tensor.placement_types": (*_SPEC, *_PLACEMENTS, "_Partial"),
        **_MESH,
    },
    "2.4": {
        "torch.distributed._tensor.api": ("DTensor",),
        "torch.distributed._tensor._dtensor_spec": _SPEC,
        "torch.distributed._tensor.placement_types": (*_PLACEMENTS, "Partial"),
        **_MESH,
    },
    "2.5": _NEW,
    "2.9": {**_NEW, "torch.distributed._mesh_layout": ("_MeshLayout",)},
}


OLD_TORCHES = tuple(_VERSIONS)


@dataclass
class Cut:
    """One rank's piece.

    Attributes:
        shards: for each mesh dimension the dimension cut, None, `"sum"`, or (dimension, split factor) of a
            strided cut.
    """

    piece: torch.Tensor
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    coordinate: tuple[int, ...]
    shards: tuple[int | tuple[int, int] | str | None, ...]


def _reduced(self: Any, protocol: int) -> Any:
    del protocol
    return self.reduced


@contextmanager
def _stand_ins(version: str) -> Iterator[dict[str, type]]:
    """The classes under the names they had, while it lasts."""
    made: dict[str, type] = {}
    modules = {}
    for module, names in _VERSIONS[version].items():
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


def save_as_old_torch(path: Path, state: Mapping[str, Cut | torch.Tensor], version: str) -> None:
    """One rank's file."""
    with _stand_ins(version) as classes:
        meshes: dict[Any, Any] = {}
        content = {
            name: _distributed(value, classes, meshes, version) if isinstance(value, Cut) else value
            for name, value in state.items()
        }
        torch.save(content, path)


def _distributed(cut: Cut, classes: dict[str, type], meshes: dict[Any, Any], version: str) -> Any:
    key = (cut.grid, cut.coordinate)
    if key not in meshes:
        ranks = torch.arange(torch.Size(cut.grid).numel(), dtype=torch.int32).reshape(cut.grid)
        about = {"device_type": "cuda", "mesh": ranks, "mesh_dim_names": None}
        listed = tuple(ranks.flatten().tolist())
        groups = {"_dim_group_infos": [("ptd:0", list(listed), "1")]} if version < "2.9" else {}
        identity: dict[str, Any] = {"_hash": 1} if version < "2.5" else {"_thread_id": 140_000}
        if version >= "2.9":
            layout = _with(classes["_MeshLayout"], shape=cut.grid, stride=ranks.stride())
            identity |= {"_layout": layout, "_flatten_mapping": {}, "_dim_group_names": ["0"]}
        own = {"_flatten_mesh_list": listed, "_coordinate_on_dim": list(cut.coordinate)}
        meshes[key] = _with(classes["DeviceMesh"], **about, **own, **identity, **groups)
    placements = tuple(_placement(how, classes) for how in cut.shards)
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


def _placement(how: int | tuple[int, int] | str | None, classes: dict[str, type]) -> Any:
    if how is None:
        return _with(classes["Replicate"])
    if how == "sum":
        return _with(classes["Partial" if "Partial" in classes else "_Partial"], reduce_op="sum")
    if isinstance(how, tuple):
        return _with(classes["_StridedShard"], dim=how[0], split_factor=how[1])
    return _with(classes["Shard"], dim=how)
