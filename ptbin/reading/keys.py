"""Names and values of a state dict made fit for writing: dropped, stripped, renamed, sorted out.

Pure. `keep_writable` decides which values a `weights_only=True` reader can take; `rename_entries`
applies the caller's rules and refuses two tensors under one name.
"""

from __future__ import annotations

import re
from typing import Any

from ptbin.errors import NoStateDictError, OutputCollisionError, UnsupportedTensorError
from ptbin.nodes import DictNode, Global, Instance, NdArray, Opaque, SetNode
from ptbin.options import ConvertOptions
from ptbin.state_dict import LeftOut, StateDict
from ptbin.tensors import SparseTensor, TensorRef

__all__ = ["keep_writable", "rename_entries", "wrapper_prefixes"]

MAX_VALUE_DEPTH = 100

# torch.compile wraps a module as `_orig_mod` wherever it stands; DataParallel and DistributedDataParallel
# wrap the whole model as `module`.
_COMPILED = "_orig_mod"
_PARALLEL = "module"


def keep_writable(state_dict: StateDict, uri: str) -> None:
    """Move what cannot be written to `left_out`.

    Raises:
        UnsupportedTensorError: a tensor with data that ptbin cannot take; leaving it out would make
            an incomplete model look whole.
        NoStateDictError: nothing remains.
    """
    kept: list[tuple[str, Any]] = []
    for name, value in state_dict.entries:
        if isinstance(value, Opaque):
            if value.has_data:
                raise UnsupportedTensorError(f"{uri}: {name!r} is a {value.kind}: {value.reason}")
            state_dict.left_out.append(LeftOut(name, 0, value.reason))
        elif _is_writable(value, 0, set()):
            kept.append((name, value))
        else:
            state_dict.left_out.append(
                LeftOut(name, 0, f"weights_only=True cannot read a {_describe(value)}")
            )
    if not any(isinstance(v, (TensorRef, SparseTensor)) for _, v in kept):
        raise NoStateDictError(f"{uri}: no tensor with data in {state_dict.path!r}")
    state_dict.entries = kept
    if state_dict.metadata is not None and not _is_metadata(state_dict.metadata):
        state_dict.left_out.append(LeftOut("_metadata", 0, "weights_only=True cannot read it"))
        state_dict.metadata = None


def _is_metadata(value: Any) -> bool:
    return isinstance(value, DictNode) and _is_writable(value, 0, set())


def _is_writable(value: Any, depth: int, done: set[int]) -> bool:
    """Whether weights_only=True reads what we would write (torch/_weights_only_unpickler.py)."""
    if value is None or isinstance(
        value, (bool, float, complex, str, bytes, bytearray, TensorRef, SparseTensor)
    ):
        return True
    if isinstance(value, int):
        return value.bit_length() < 2000  # LONG1 holds 255 bytes
    if isinstance(value, Global):
        return value.module == "torch" and value.name not in ("Tensor", "device", "Size")
    if isinstance(value, Instance):
        return value.class_path == "torch.device" and isinstance(value.args, tuple) and not value.state
    if depth > MAX_VALUE_DEPTH:
        return False
    if id(value) in done:
        return True
    if isinstance(value, DictNode):
        below = [part for pair in value.pairs for part in pair]
        hashable = all(isinstance(key, (str, int, float, bytes, tuple, type(None))) for key, _ in value.pairs)
        if value.kind not in ("dict", "OrderedDict") or value.state is not None or not hashable:
            return False
    elif isinstance(value, (list, tuple)):
        below = list(value)
    elif isinstance(value, SetNode):
        below = list(value.items)
        if value.frozen:
            return False
    else:
        return False
    if any(child is value for child in below) or not all(
        _is_writable(child, depth + 1, done) for child in below
    ):
        return False
    done.add(id(value))
    return True


def _describe(value: Any) -> str:
    if isinstance(value, NdArray):
        return "numpy scalar" if value.scalar else "numpy array"
    if isinstance(value, Instance):
        return value.class_path
    if isinstance(value, Global):
        return f"reference to {value.path}"
    if isinstance(value, DictNode):
        return f"{value.kind} of such values"
    return type(value).__name__


def wrapper_prefixes(names: list[str]) -> list[str]:
    """The names with `_orig_mod` taken out anywhere and `module` off the front where all carry it."""
    parts = [name.split(".") for name in names]
    while True:
        parts = [[p for p in name if p != _COMPILED] or name for name in parts]
        if not parts or not all(len(name) > 1 and name[0] == _PARALLEL for name in parts):
            return [".".join(name) for name in parts]
        parts = [name[1:] for name in parts]


def rename_entries(state_dict: StateDict, options: ConvertOptions, uri: str) -> None:
    """Apply `drop`, `strip_prefix` and `rename`, in this order.

    Raises:
        OutputCollisionError: two entries end up under one name.
        NoStateDictError: everything was dropped.
    """
    entries = state_dict.entries
    for pattern in options.drop:
        expression = re.compile(pattern)
        for name, value in entries:
            if expression.search(name):
                nbytes = value.nbytes if isinstance(value, TensorRef) else 0
                state_dict.left_out.append(LeftOut(name, nbytes, f"dropped by {pattern!r}"))
        entries = [(name, value) for name, value in entries if not expression.search(name)]
    if not any(isinstance(v, (TensorRef, SparseTensor)) for _, v in entries):
        raise NoStateDictError(f"{uri}: the rules drop every tensor of {state_dict.path!r}")
    old = [name for name, _ in entries]
    new = _renamed(old, options)
    clashes = {name for name in new if new.count(name) > 1} if len(set(new)) < len(new) else set()
    if clashes:
        first = min(clashes)
        sources = [o for o, n in zip(old, new, strict=True) if n == first]
        raise OutputCollisionError(f"{uri}: {' and '.join(map(repr, sources))} would both be named {first!r}")
    state_dict.source_names = {n: o for o, n in zip(old, new, strict=True) if n != o}
    state_dict.entries = [(n, value) for n, (_, value) in zip(new, entries, strict=True)]
    if state_dict.metadata is not None and state_dict.source_names:
        state_dict.metadata = _renamed_metadata(state_dict.metadata, old, options)


def _renamed(names: list[str], options: ConvertOptions) -> list[str]:
    if options.strip_prefix == "auto":
        names = wrapper_prefixes(names)
    elif options.strip_prefix:
        names = [name.removeprefix(options.strip_prefix) for name in names]
    for pattern, replacement in options.rename:
        names = [re.sub(pattern, replacement, name) for name in names]
    return names


def _renamed_metadata(metadata: DictNode, names: list[str], options: ConvertOptions) -> DictNode:
    """`_metadata` is keyed by module path: follow each path through the names of the tensors below it."""
    renamed = DictNode(metadata.kind)
    taken: set[str] = set()
    moved = dict(zip(names, _renamed(names, options), strict=True))
    for key, value in metadata.pairs:
        if not isinstance(key, str):
            continue
        prefix = f"{key}." if key else ""
        new = key
        for old_name, new_name in moved.items():
            tail = old_name[len(prefix) :]
            if old_name.startswith(prefix) and new_name.endswith(tail):
                new = new_name[: len(new_name) - len(tail)].removesuffix(".")
                break
        if new not in taken:
            taken.add(new)
            renamed.pairs.append((new, value))
    return renamed
