"""What must hold of every checkpoint: each storage is taken, or left out under a known role, or stops the
conversion.

The oracles are torch's own reader and Python's pickler: the pickler is asked for every storage and array that
it would write, torch for what the file holds. Nothing of ptbin's reading is used. Only for files that the
test wrote itself: they are unpickled.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ptbin
from ptbin.errors import PtbinError
from tests.bits import same_bits

__all__ = ["Holdings", "at_path", "hold", "write"]

SOUND_REASONS = frozenset(
    ["ambiguous_state_dict", "no_state_dict", "unsupported_tensor", "incomplete_checkpoint"]
)
"""Why a sound file may be refused. It is never damaged, unsafe, or too large."""

COPIES = frozenset(["averaged_copy", "raw_copy", "same_weights", "precision_copy"])
NO_WEIGHTS = frozenset(["attribute", "non_persistent_buffer", "loss_function"])


def write(value: Any, path: Path, writer: str) -> None:
    """Save by `zip`, `legacy` (before torch 1.6) or plain `pickle`."""
    if writer == "pickle":
        path.write_bytes(pickle.dumps(value, protocol=4))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=writer == "zip")


@dataclass
class Holdings:
    """The storages and arrays below a value, as a pickler meets them: key to size in bytes."""

    sizes: dict[Any, int] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, value: Any) -> Holdings:
        found = cls()
        _Collector(found).dump(value)
        return found

    def add(self, key: Any, nbytes: int, owner: Any) -> None:
        self.sizes[key] = nbytes
        self.kept.append(owner)  # an address is unique only while its owner lives

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


class _Collector(pickle.Pickler):
    """Writes nothing; asks what would be written."""

    def __init__(self, found: Holdings) -> None:
        super().__init__(io.BytesIO(), protocol=2)
        self.found = found

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            obj = obj._untyped_storage
        if isinstance(obj, torch.UntypedStorage):
            if obj.nbytes():
                self.found.add(obj.data_ptr(), obj.nbytes(), obj)
            return "storage"
        if isinstance(obj, np.ndarray) and obj.dtype.kind != "O":
            self.found.add(("array", id(obj)), obj.nbytes, obj)
            return "array"
        if isinstance(obj, bytes) and (obj.startswith(b"PK\3\4") or b"\x8a\nl\xfc\x9cF" in obj[:32]):
            self.found.add(("bytes", id(obj)), len(obj), obj)
            return "bytes"
        return None


def state_of(value: Any) -> Any:
    """What torch gives for a place: `state_dict()` of modules, mappings as they are."""
    if isinstance(value, torch.nn.Module):
        return value.state_dict()
    if isinstance(value, (UserDict, Mapping)):
        return dict(value)
    if isinstance(value, (list, tuple)) and all(isinstance(v, (list, tuple)) and len(v) == 2 for v in value):
        return {pair[0]: pair[1] for pair in value}
    return value


def at_path(root: Any, path: str) -> list[Any]:
    """What a dotted path leads to; where a step leads nowhere, the last place that was reached.

    Several where steps fit several keys. The root alone is `.`.
    """
    places = [(root, "" if path == "." else path)]
    ends: list[Any] = []
    while places:
        node, rest = places.pop()
        if not rest:
            ends.append(node)
            continue
        fitting = [
            (child, rest[len(step) + 1 :])
            for step, child in _steps(node)
            if rest == step or rest.startswith(f"{step}.")
        ]
        if not fitting:
            ends.append(node)
        places.extend(fitting)
    return ends


def _steps(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, UserDict):
        node = node.data
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield (key if isinstance(key, str) else str(key) if type(key) is int else "?"), child
    if isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield str(index), child
            if isinstance(child, (list, tuple)) and len(child) == 2 and isinstance(child[0], str):
                yield child[0], child[1]
        for name in getattr(node, "_fields", ()):
            yield name, getattr(node, name)
    if isinstance(node, torch.nn.Module):
        for registered in (node._parameters, node._buffers, node._modules):
            yield from registered.items()
    if hasattr(node, "__dict__") and not isinstance(node, type):
        yield from vars(node).items()
    for cls in type(node).__mro__:
        for name in vars(cls).get("__slots__", ()):
            if hasattr(node, name):
                yield name, getattr(node, name)


def hold(path: Path, *, models: Sequence[str] = (), **options: Any) -> str | None:
    """Convert a file of ours and hold the law; the reason where it is refused.

    Args:
        models: paths of what is a model's weights in it, whatever it is called.
    """
    output = path.parent / "out" / "weights.bin"
    chosen = ptbin.ConvertOptions(**options)
    seen = ptbin.inspect(str(path), options=chosen)
    refusal: PtbinError | None = None
    try:
        manifest = ptbin.convert(str(path), str(output), chosen)
    except PtbinError as error:
        refusal = error
    assert seen["reason"] == (refusal.reason if refusal else None)
    if refusal is not None:
        fair = SOUND_REASONS | ({"output_collision"} if len(chosen.selected_paths) > 1 else set())
        assert refusal.reason in fair, f"{refusal.reason}: {refusal}"
        assert not output.parent.exists() or not any(output.parent.iterdir())
        return refusal.reason
    assert seen["selected"] == manifest["selected"]
    assert seen["accounting"] == manifest["accounting"]
    assert ptbin.verify(str(output) + ".manifest.json") == []
    assert ptbin.verify(str(_doctored(output))) != []
    loaded = _loaded(path)
    sources = _sources(manifest, output.parent, loaded, chosen)
    _check_sums(manifest, loaded, sources)
    _check_named(manifest, loaded, sources, models if options.get("select") is None else ())
    return None


def _loaded(path: Path) -> Any:
    with path.open("rb") as file:
        is_torch = file.read(2) == b"PK" or b"\x8a\nl\xfc\x9cF" in file.read(30)
    return torch.load(path, weights_only=False) if is_torch else pickle.loads(path.read_bytes())


def _doctored(output: Path) -> Path:
    """A manifest whose accounting says less than its rows."""
    stored = output.with_name(output.name + ".manifest.json")
    manifest = json.loads(stored.read_text())
    manifest["accounting"]["taken_bytes"] -= 1
    doctored = output.with_name("doctored.manifest.json")
    doctored.write_text(json.dumps(manifest))
    return doctored


def _sources(manifest: dict[str, Any], folder: Path, loaded: Any, chosen: ptbin.ConvertOptions) -> list[Any]:
    """What torch has of everything in the output, which is the same."""
    files = [torch.load(folder / file["path"], weights_only=True) for file in manifest["outputs"]]
    paths = manifest["selected"].split(", ")
    if chosen.split:
        return [
            source for path, found in zip(paths, files, strict=True) for source in _at(path, loaded, found)
        ]
    (found,) = files
    if len(paths) > 1:
        return _below_paths(".", loaded, found)
    return _below_paths(paths[0], loaded, found) if chosen.flatten else _at(paths[0], loaded, found)


def _at(path: str, loaded: Any, found: Mapping[str, Any]) -> list[Any]:
    """The output is what torch gives for that place, name by name; what torch gives."""
    wanted = state_of(at_path(loaded, path)[0])
    if isinstance(wanted, list) and path.endswith("shadow_params"):
        # under the names of the parameters that they follow
        assert all(map(_same, found.values(), wanted)), path
        return wanted
    assert isinstance(wanted, Mapping), f"{path!r} is a {type(wanted)}"
    missing = {name for name, value in wanted.items() if isinstance(name, str) and _has_data(value)}
    assert not missing - found.keys(), f"missing {sorted(missing - found.keys())}"
    for name, value in found.items():
        assert _same(value, wanted[name]), f"{name!r}: {value!r} is not {wanted[name]!r}"
    return [wanted[name] for name in found]


def _below_paths(base: str, loaded: Any, found: Mapping[str, Any]) -> list[Any]:
    """Each value of the output lies under its name below the base; what lies there."""
    sources = []
    for name, value in found.items():
        there = [
            place
            for start in at_path(loaded, base)
            for place in [*at_path(state_of(start), name), *at_path(start, name)]
        ]
        fitting = [place for place in there if _same(value, place)]
        assert fitting, f"{name!r} is not what lies there"
        sources.append(fitting[0])
    return sources


def _check_sums(manifest: dict[str, Any], loaded: Any, sources: list[Any]) -> None:
    """The bytes are those that torch would write, and those that the selected tensors show."""
    accounting = manifest["accounting"]
    everything = Holdings.of(loaded)
    assert accounting["source_tensor_bytes"] == everything.nbytes
    spans: dict[Any, list[tuple[int, int]]] = {}
    for source in sources:
        for key, start, end in _spans(source):
            spans.setdefault(key, []).append((start, end))
    assert accounting["taken_bytes"] == sum(map(_covered, spans.values()))


def _spans(value: Any) -> Iterator[tuple[Any, int, int]]:
    """(storage, first byte, end) of all tensors below."""
    if isinstance(value, torch.Tensor):
        for tensor in _parts(_plain(value)):
            if not tensor.numel():
                continue
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = int(tensor.storage_offset()) * tensor.itemsize
            end = start + (int(last) + 1) * tensor.itemsize
            yield tensor.untyped_storage().data_ptr(), start, end
    elif isinstance(value, np.ndarray):
        yield ("array", id(value)), 0, value.nbytes
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _spans(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _spans(child)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout is torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.is_quantized and tensor.qscheme() is not torch.per_tensor_affine:
        return [tensor, tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
    return [tensor]


def _covered(spans: list[tuple[int, int]]) -> int:
    total = position = 0
    for start, end in sorted(spans):
        total += max(end - max(start, position), 0)
        position = max(position, end)
    return total


def _has_data(value: Any) -> bool:
    return bool(Holdings.of(value).sizes)


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, np.ndarray):
        other = torch.from_numpy(np.ascontiguousarray(other).copy()).view(other.shape)
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and same_bits(_plain(one), _plain(other))
    if isinstance(one, (list, tuple)):
        return (
            isinstance(other, (list, tuple))
            and len(one) == len(other)
            and all(_same(a, b) for a, b in zip(one, other, strict=True))
        )
    if isinstance(one, dict):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(_same(one[key], other[key]) for key in one)
        )
    return type(one) is type(other) and bool(one == other)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    detached = tensor.detach()
    return detached if type(detached) is torch.Tensor else detached.as_subclass(torch.Tensor)


def _check_named(manifest: dict[str, Any], loaded: Any, sources: list[Any], models: Sequence[str]) -> None:
    """What the output does not show lies below a path that the manifest lists, and is no model's weights."""
    taken = {key for source in sources for key in Holdings.of(source).sizes}
    everything = Holdings.of(loaded)
    named: dict[Any, set[str]] = {}
    for row in manifest["left_out"]:
        if row["nbytes"]:
            below = everything if row["role"] == "unviewed" else _below(loaded, row["path"])
            assert row["nbytes"] <= below.nbytes, f"{row}: only {below.nbytes} bytes lie there"
            for key in below.sizes:
                named.setdefault(key, set()).add(row["role"])
    for key, nbytes in everything.sizes.items():
        assert key in taken or key in named, f"{nbytes} bytes are neither taken nor named"
    for path in models:
        for key in _below(loaded, path).sizes.keys() - taken:
            roles = named[key] - {"unviewed"}
            assert roles & (COPIES | NO_WEIGHTS), f"weights at {path!r} are left out as {roles}"


def _below(loaded: Any, path: str) -> Holdings:
    found = Holdings()
    for place in at_path(loaded, path):
        _Collector(found).dump(place)
    return found
