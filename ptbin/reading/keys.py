"""Names and values of a state dict made fit for writing: dropped, sorted out, stripped, renamed.

Pure. `drop_entries` leaves out what the caller asks to; `keep_writable` decides which values a
`weights_only=True` reader can take and refuses to lose data; `rename_entries` applies the caller's rules and
refuses two tensors under one name.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from ptbin.errors import NoStateDictError, OutputCollisionError, UnsupportedTensorError, UsageError
from ptbin.options import ConvertOptions
from ptbin.reading.tree import DataSearch, iter_data
from ptbin.values.dtypes import BY_NAME
from ptbin.values.nodes import DictNode, Global, Instance, NdArray, Opaque, SetNode, iter_nodes
from ptbin.values.state_dict import StateDict
from ptbin.values.tensors import SparseTensor, TensorRef

MAX_VALUE_DEPTH = 32

# torch.compile wraps a module as `_orig_mod` wherever it stands; DataParallel and DistributedDataParallel
# wrap the whole model as `module`.
_COMPILED = "_orig_mod"
_PARALLEL = "module"


def keep_writable(state_dict: StateDict, uri: str, search: DataSearch) -> None:
    """Leave out values that nothing is lost with and that a `weights_only=True` reader cannot take.

    Raises:
        UnsupportedTensorError: an entry that holds data and cannot be kept as it is; leaving it out
            would make an incomplete model look whole.
        NoStateDictError: nothing remains.
    """
    kept: list[tuple[str, Any]] = []
    done: set[int] = set()
    for name, value in state_dict.entries:
        if type(value) is TensorRef and not value.attributes:
            kept.append((name, value))  # as nearly all are
            continue
        if isinstance(value, Opaque) and not value.has_data:
            state_dict.leave_out(name, "value", value.reason)
            continue
        _refuse_loss(name, value, uri, done, search)
        if _is_writable(value, 0, done):
            kept.append((name, value))
        else:
            state_dict.leave_out(name, "value", f"weights_only=True cannot read a {_describe(value)}")
    if not any(isinstance(v, (TensorRef, SparseTensor)) for _, v in kept):
        raise NoStateDictError(f"{uri}: no tensor with data in {state_dict.path!r}")
    state_dict.entries = kept
    if state_dict.metadata is not None and not _is_metadata(state_dict.metadata):
        _refuse_loss("_metadata", state_dict.metadata, uri, set(), search)
        state_dict.leave_out("_metadata", "value", "weights_only=True cannot read it")
        state_dict.metadata = None


def _refuse_loss(name: str, value: Any, uri: str, done: set[int], search: DataSearch) -> None:
    """Raise UnsupportedTensorError where a value holds data that would not go along."""
    way_out = f"--drop '{re.escape(name)[:200]}$' leaves it out"
    if isinstance(value, Opaque):
        raise UnsupportedTensorError(f"{uri}: {name!r} is a {value.kind}: {value.reason}; {way_out}")
    if isinstance(value, TensorRef):
        holding = [key for key, attribute in value.attributes if search.holds(attribute)]
        if holding:
            names = ", ".join(map(repr, holding[:5]))
            raise UnsupportedTensorError(
                f"{uri}: {name!r} is a tensor with tensors for attributes ({names}; bitsandbytes keeps "
                "scales so), without which it is another; load the checkpoint with the library that wrote "
                f"it and save its state_dict() as plain tensors; {way_out}"
            )
        return
    if isinstance(value, SparseTensor) or not search.holds(value):
        return
    for data in iter_data(value):
        if isinstance(data, Opaque):
            raise UnsupportedTensorError(f"{uri}: {name!r} holds a {data.kind}: {data.reason}; {way_out}")
        if isinstance(data, TensorRef) and data.attributes:
            _refuse_loss(name, data, uri, done, search)
    if not _is_writable(value, 0, done):
        raise UnsupportedTensorError(
            f"{uri}: {name!r} is a {_describe(value)} that holds tensors, which weights_only=True cannot "
            f"read; save its tensors under separate names; {way_out}"
        )


def _is_metadata(value: Any) -> bool:
    held = (node for node in iter_nodes(value) if isinstance(node, (TensorRef, SparseTensor)))
    return isinstance(value, DictNode) and _is_writable(value, 0, set()) and next(held, None) is None


def _is_writable(value: Any, depth: int, done: set[int]) -> bool:
    """Whether weights_only=True reads what we would write (torch/_weights_only_unpickler.py)."""
    if value is None or isinstance(
        value, (bool, float, complex, str, bytes, bytearray, TensorRef, SparseTensor)
    ):
        return True
    if isinstance(value, int):
        return value.bit_length() < 2000  # LONG1 holds 255 bytes
    if isinstance(value, Global):
        return value.module == "torch" and value.name in BY_NAME
    if isinstance(value, Instance):
        return _is_device(value)
    if depth > MAX_VALUE_DEPTH:
        return False
    if id(value) in done:
        return True
    if isinstance(value, DictNode):
        below = [part for pair in value.pairs for part in pair]
        hashable = all(_is_plain_key(key) for key, _ in value.pairs)
        if value.kind not in ("dict", "OrderedDict") or value.state is not None or not hashable:
            return False
    elif isinstance(value, (list, tuple)):
        below = list(value)
    elif isinstance(value, SetNode):
        below = list(value.items)
        if value.frozen or not all(_is_plain_key(item) for item in value.items):
            return False
    else:
        return False
    if any(child is value for child in below) or not all(
        _is_writable(child, depth + 1, done) for child in below
    ):
        return False
    done.add(id(value))
    return True


def _is_plain_key(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain_key(item) for item in value) if len(value) < 10 else False
    return value is None or (isinstance(value, (str, float, bytes, int)) and not isinstance(value, DictNode))


def _is_device(value: Instance) -> bool:
    """`torch.device('cuda')` or `torch.device('cuda', 0)`, and nothing else about it."""
    if (
        value.class_path != "torch.device"
        or value.kwargs
        or value.items
        or value.pairs
        or value.state is not None
    ):
        return False
    args = value.args
    if not isinstance(args, tuple) or not 1 <= len(args) <= 2 or not isinstance(args[0], str):
        return False
    return len(args) == 1 or type(args[1]) is int


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


def drop_entries(state_dict: StateDict, options: ConvertOptions, uri: str) -> None:
    """Leave out what `options.drop` matches; before anything that cannot be kept is refused.

    Raises:
        NoStateDictError: everything was dropped.
    """
    entries = state_dict.entries
    for pattern in options.drop:
        expression = re.compile(pattern)
        for name, value in entries:
            if expression.search(name):
                state_dict.leave_out(name, "dropped", f"dropped by {pattern!r}", value)
        entries = [(name, value) for name, value in entries if not expression.search(name)]
    if not any(isinstance(v, (TensorRef, SparseTensor, Opaque)) for _, v in entries):
        raise NoStateDictError(f"{uri}: the rules drop every tensor of {state_dict.path!r}")
    state_dict.entries = entries


def rename_entries(state_dict: StateDict, options: ConvertOptions, uri: str) -> None:
    """Apply `strip_prefix` and `rename`, in this order.

    Raises:
        OutputCollisionError: two entries end up under one name.
    """
    entries = state_dict.entries
    old = [name for name, _ in entries]
    new = new_names(old, options)
    clashes = [name for name, count in Counter(new).items() if count > 1]
    if clashes:
        first = min(clashes)
        sources = [o for o, n in zip(old, new, strict=True) if n == first]
        raise OutputCollisionError(f"{uri}: {' and '.join(map(repr, sources))} would both be named {first!r}")
    before = state_dict.source_names
    state_dict.source_names = {
        n: before.get(o, o) for o, n in zip(old, new, strict=True) if before.get(o, o) != n
    }
    state_dict.entries = [(n, value) for n, (_, value) in zip(new, entries, strict=True)]
    if state_dict.metadata is not None and old != new:
        state_dict.metadata = _renamed_metadata(state_dict.metadata, old, options)


def new_names(names: list[str], options: ConvertOptions) -> list[str]:
    """The names under `strip_prefix` and `rename`."""
    if options.strip_prefix == "auto":
        names = without_wrappers(names)
    elif options.strip_prefix:
        names = [name.removeprefix(options.strip_prefix) for name in names]
    for pattern, replacement in options.rename:
        try:
            names = [re.sub(pattern, replacement, name) for name in names]
        except (re.error, IndexError) as error:
            raise UsageError(f"--rename: {replacement!r} does not fit {pattern!r}: {error}") from error
    return names


def _renamed_metadata(metadata: DictNode, names: list[str], options: ConvertOptions) -> DictNode:
    """`_metadata` is keyed by module path: follow each path through the names of the tensors below it."""
    renamed = DictNode(metadata.kind)
    moved: dict[str, str] = {}
    for old, new in zip(names, new_names(names, options), strict=True):
        # Every module path above this tensor, if what stands below it kept its name.
        cut = old.rfind(".")
        while cut >= 0:
            tail = old[cut:]
            if not new.endswith(tail):
                break
            moved.setdefault(old[:cut], new[: len(new) - len(tail)])
            cut = old.rfind(".", 0, cut)
        if new.endswith(f".{old}"):
            moved.setdefault("", new[: -len(old) - 1])
    taken: set[str] = set()
    for key, value in metadata.pairs:
        if not isinstance(key, str):
            continue
        target = moved.get(key, key)
        if target not in taken:
            taken.add(target)
            renamed.pairs.append((target, value))
    return renamed


def without_wrappers(names: list[str]) -> list[str]:
    """The names with `_orig_mod` taken out anywhere and `module` off the front where all carry it."""
    parts = [name.split(".") for name in names]
    while True:
        parts = [[p for p in name if p != _COMPILED] or name for name in parts]
        if not parts or not all(len(name) > 1 and name[0] == _PARALLEL for name in parts):
            return [".".join(name) for name in parts]
        parts = [name[1:] for name in parts]
