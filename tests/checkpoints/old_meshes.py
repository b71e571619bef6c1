"""DTensors in the forms of older torches, which this one does not write: stand-ins pickled as theirs.

    save_as_old_torch(path, {"w": Cut(piece, (10, 3), (2, 2), (0, 1), shards=(0, None))}, "2.3")

The names and attributes are those of the published sources, at these states of main:

- 2.3: distributed/_tensor/{api,placement_types}.py, device_mesh.py with a `mesh` tensor, `_flatten_mesh_list`
  and `_hash`; no layout and no map of ranks. 2.4: the spec in `_tensor._dtensor_spec`.
- 2.5 (to 2.8): the public module distributed.tensor, a mesh with `_thread_id`; placements are dataclasses.
- 2.9: the mesh's `_layout` (a `_MeshLayout` of `shape` and `stride`) next to the tensor.
- 2.10 (device_mesh.py when slicing flattened dimensions was deprecated): `_rank_map` in place of the tensor,
  `_flatten_rank_map`, and the slice's own `_flatten_mesh_list`; the spec has `shard_order`, which of strided
  placements is the decoded order (_dtensor_spec.py, `_normalize_placements_into_shard_order`); placements are
  pybind objects that pickle as the dataclasses did (csrc/distributed/python_placement.cpp).
- 2.12 (device_mesh.py with `_compute_coordinate_on_dim`): `_rank` and a tuple of coordinates, no own list.
"""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
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
    "2.10": {
        **_NEW,
        "torch.distributed.tensor._dtensor_spec": (*_SPEC, "ShardOrderEntry"),
        "torch.distributed._mesh_layout": ("_MeshLayout",),
    },
}
_VERSIONS["2.12"] = _VERSIONS["2.10"]
_TUPLES = {"TensorMeta": ("shape", "stride", "dtype"), "ShardOrderEntry": ("tensor_dim", "mesh_dims")}


OLD_TORCHES = tuple(_VERSIONS)


@dataclass
class Cut:
    """One rank's piece.

    Attributes:
        shards: for each mesh dimension the dimension cut, None, `"sum"`, or (dimension, split factor) of a
            strided cut.
        first_rank: of a mesh that is a slice of a larger one, along its last dimensions.
        world: ranks of that larger mesh.
    """

    piece: torch.Tensor
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    coordinate: tuple[int, ...]
    shards: tuple[int | tuple[int, int] | str | None, ...]
    first_rank: int = 0
    world: int = 0


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
            if name in _TUPLES:
                made[name] = _tuple_kind(module, name)
            elif name == "DTensor":
                made[name] = type(name, (), {"__module__": module, "__reduce_ex__": _reduced})
            setattr(modules[module], name, made[name])
    with mock.patch.dict(sys.modules, modules):
        yield made


def _tuple_kind(module: str, name: str) -> type:
    kind: type = NamedTuple(name, [(field, Any) for field in _TUPLES[name]])  # type: ignore[misc]
    kind.__module__ = module
    return kind


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


def _mesh(cut: Cut, classes: dict[str, type], version: str) -> Any:
    place = tuple(map(int, version.split(".")))
    count = math.prod(cut.grid)
    ranks = torch.arange(cut.first_rank, cut.first_rank + count, dtype=torch.int32).reshape(cut.grid)
    own = {"_flatten_mesh_list": tuple(ranks.flatten().tolist())}
    about: dict[str, Any] = {"_coordinate_on_dim": list(cut.coordinate)}
    if place >= (2, 9):
        layout = _with(classes["_MeshLayout"], shape=cut.grid, stride=ranks.stride())
        about |= {"_layout": layout, "_flatten_mapping": {}, "_dim_group_names": ["0"]}
    if place < (2, 10):
        about |= {"device_type": "cuda", "mesh": ranks, "mesh_dim_names": None, **own}
        about |= {"_hash": 1} if place < (2, 5) else {"_thread_id": 140_000}
        if place < (2, 9):
            about["_dim_group_infos"] = [("ptd:0", list(own["_flatten_mesh_list"]), "1")]
        return _with(classes["DeviceMesh"], **about)
    world = max(cut.world, count)
    about |= {"_device_type": "cuda", "_mesh_dim_names": None, "_root_mesh": None, "_thread_id": None}
    about |= {"_rank_map": torch.arange(world, dtype=torch.int32), "_flatten_rank_map": tuple(range(world))}
    if place < (2, 12):
        return _with(classes["DeviceMesh"], **about, **own)
    steps = zip(cut.coordinate, ranks.stride(), strict=True)
    about |= {"_rank": cut.first_rank + sum(c * step for c, step in steps), "_hash": None}
    return _with(classes["DeviceMesh"], **{**about, "_coordinate_on_dim": tuple(cut.coordinate)})


def _shard_order(cut: Cut, entry: Any) -> tuple[Any, ...]:
    """The order of the cuts along each dimension: of two, the strided one comes second."""
    cuts = [(how if isinstance(how, tuple) else (how, 1), i) for i, how in enumerate(cut.shards)]
    plain = sorted((dim, factor, i) for (dim, factor), i in cuts if isinstance(dim, int))
    return tuple(
        entry(dim, tuple(i for *_, i in rows)) for dim, rows in itertools.groupby(plain, lambda row: row[0])
    )


def _distributed(cut: Cut, classes: dict[str, type], meshes: dict[Any, Any], version: str) -> Any:
    key = (cut.grid, cut.coordinate, cut.first_rank)
    if key not in meshes:
        meshes[key] = _mesh(cut, classes, version)
    placements = tuple(_placement(how, classes) for how in cut.shards)
    shape = torch.Size(cut.shape)
    strides = torch.empty(shape, device="meta").stride()
    meta = classes["TensorMeta"](shape, strides, cut.piece.dtype)
    about: dict[str, Any] = {"mesh": meshes[key], "placements": placements, "tensor_meta": meta}
    if "ShardOrderEntry" in classes:
        about |= {"shard_order": _shard_order(cut, classes["ShardOrderEntry"]), "_hash": None}
    spec = _with(classes["DTensorSpec"], **about)
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
