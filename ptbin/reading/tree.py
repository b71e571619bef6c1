"""Ways down a checkpoint's records: by name, for people and `--select`; and to everything that holds data.

Both ways are complete: whatever `nodes.children` reaches, `named_children` names. Pure; each walk visits a
record once, so its cost is linear in the records whatever the graph unfolds to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ptbin.errors import LimitExceededError
from ptbin.values.nodes import DictNode, Global, Instance, NdArray, Opaque, SetNode, children
from ptbin.values.tensors import SparseTensor, TensorRef, TypedStorage

Data = TensorRef | SparseTensor | TypedStorage | NdArray | Opaque | bytes | bytearray

_PLAIN = (str, int, float, bool, complex, type(None), Global)

# How torch.save's output begins: a zip archive's local header, and the magic number's pickle of before 1.6
# (torch/serialization.py, `MAGIC_NUMBER`) behind the protocol's two bytes.
_ZIP_HEAD = b"PK\x03\x04"
_LEGACY_HEAD = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"

_REBUILDS = re.compile(r"rebuild|reduce|reconstruct|_from_|^_?make_|unflatten", re.IGNORECASE)

_USER_DICTS = ("collections.UserDict", "UserDict.UserDict", "UserDict.IterableUserDict")


def is_branch(value: Any) -> bool:
    """A record that may hold others."""
    return isinstance(value, (DictNode, Instance, list, tuple))


def _is_saved_file(value: Any) -> bool:
    """Bytes that are the output of another `torch.save`."""
    return isinstance(value, (bytes, bytearray)) and (
        value.startswith(_ZIP_HEAD) or _LEGACY_HEAD in bytes(value[:32])
    )


def is_unreadable_tensor(node: Any) -> bool:
    """A call that is given a storage: a tensor that only the function called there can rebuild.

    So geoopt's manifold parameters, vendors' device tensors and the like are pickled. A storage counts
    wherever in the arguments it stands, inside tuples and lists too. A tensor counts where it is an argument
    itself and the function's name says that it rebuilds something: Transformer Engine's
    `Float8Tensor._make_in_reduce_ex(data, scale, ...)`.
    """
    if not isinstance(node, Instance):
        return False
    arguments = node.args[:100] if isinstance(node.args, tuple) else ()
    if any(isinstance(value, TensorRef) for value in arguments) and _REBUILDS.search(_callee(node)):
        return True
    stack, seen = [node.args], 0
    while stack and seen < 1000:
        value = stack.pop()
        seen += 1
        if isinstance(value, TypedStorage):
            return True
        if isinstance(value, (tuple, list)):
            stack.extend(value[:100])
    return False


def _callee(node: Instance) -> str:
    """Last name of what is called; a method is written as `getattr(class, name)`."""
    if isinstance(node.cls, Global):
        return node.cls.name.rpartition(".")[2]
    args = node.cls.args if isinstance(node.cls, Instance) else ()
    return args[1] if isinstance(args, tuple) and len(args) == 2 and isinstance(args[1], str) else ""


def as_mapping(node: Any) -> DictNode | None:
    """The node where it is a mapping: a dict, a subclass of one, a `UserDict`, or a list of (name, value)
    pairs.
    """
    if isinstance(node, DictNode):
        return node
    if isinstance(node, Instance):
        if node.pairs:
            found = DictNode("dict", node.pairs)
            found.state = node.attributes()
            return found
        if node.class_path in _USER_DICTS and (attributes := node.attributes()) is not None:
            data = attributes.get("data")
            return data if isinstance(data, DictNode) else None
        return None
    if isinstance(node, (list, tuple)) and node and all(_is_pair(item) for item in node):
        return DictNode("OrderedDict", [(item[0], item[1]) for item in node])
    return None


def _is_pair(item: Any) -> bool:
    return (
        isinstance(item, (list, tuple))
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], (TensorRef, SparseTensor, Opaque))
    )


def named_children(node: Any) -> list[tuple[str, Any]]:
    """(step of a path, record) of all that lies directly below and may hold data.

    Keys that are numbers are steps by their digits, other keys that are not text by `?`.
    """
    found: list[tuple[str, Any]] = []
    if isinstance(node, DictNode):
        _add_pairs(found, node.pairs)
        if isinstance(node.state, DictNode):
            _add_pairs(found, node.state.pairs)
        else:
            found.append(("state", node.state))
    elif isinstance(node, (list, tuple)):
        found.extend((str(index), value) for index, value in enumerate(node))
    elif isinstance(node, SetNode):
        found.extend((str(index), value) for index, value in enumerate(node.items))
    elif isinstance(node, Instance):
        if not isinstance(node.cls, Global):
            found.append(("class", node.cls))
        _add_pairs(found, node.pairs)
        attributes = node.attributes()
        if attributes is not None:
            _add_pairs(found, attributes.pairs)
        if attributes is None or isinstance(node.state, tuple):
            found.append(("state", node.state))
        found.extend((str(index), value) for index, value in enumerate(node.items))
        args = node.args if isinstance(node.args, tuple) else (node.args,)
        found.extend((str(index), value) for index, value in enumerate(args))
        if isinstance(node.kwargs, list):
            _add_pairs(found, node.kwargs)
        else:
            found.append(("arguments", node.kwargs))
    elif isinstance(node, Opaque):
        found.append(("contents", node.contents))
    elif isinstance(node, NdArray):
        found.append(("objects", node.objects))
    elif isinstance(node, TensorRef):
        found.extend(node.attributes)
    return [(step, child) for step, child in found if not isinstance(child, _PLAIN)]


def _add_pairs(found: list[tuple[str, Any]], pairs: list[tuple[Any, Any]]) -> None:
    for key, value in pairs:
        if type(key) is str:
            found.append((key, value))
        else:
            found.append((str(key) if type(key) is int and abs(key) < 1 << 63 else "?", value))
            if not isinstance(key, (*_PLAIN, bytes)):
                found.append(("?", key))


def iter_data(root: Any, seen: set[int] | None = None) -> Iterator[Data]:
    """Everything below that holds bytes of weights or could: tensors, storages, arrays, nested files.

    `seen` holds the identities met by earlier walks, which are passed over, and takes up those of this one.
    """
    seen = set() if seen is None else seen
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, _PLAIN):
            continue
        if isinstance(node, (bytes, bytearray)):
            if _is_saved_file(node) and id(node) not in seen:
                seen.add(id(node))
                yield node
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        if (
            isinstance(node, (TensorRef, SparseTensor, TypedStorage))
            or (isinstance(node, Opaque) and node.has_data)
            or (isinstance(node, NdArray) and not node.scalar and node.data)
        ):
            yield node
        stack.extend(children(node))


class DataSearch:
    """Whether records hold data, asked again and again of records that share parts.

    What was found to hold none is not walked again, and all walks together visit a bounded number of records:
    a million values of a hostile file may share one that is large.
    """

    def __init__(self, most: int) -> None:
        self._barren: set[int] = set()
        self._most = most
        self._visited = 0

    def holds(self, node: Any) -> bool:
        """Raises LimitExceededError once `most` records were visited in all."""
        if isinstance(node, _PLAIN) or id(node) in self._barren:
            return False
        if isinstance(node, (TensorRef, SparseTensor, TypedStorage)):
            return True
        seen = _Seen(self._barren, self._most - self._visited)
        found = next(iter_data(node, seen), None)
        self._visited += len(seen)
        if found is None:
            self._barren |= seen
        return found is not None


class _Seen(set[int]):
    """Identities met, up to a number, and those that need no visit."""

    def __init__(self, known: set[int], most: int) -> None:
        super().__init__()
        self._known = known
        self._most = most

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self._known

    def add(self, key: int) -> None:
        if len(self) >= self._most:
            raise LimitExceededError("more records inside values than the limit allows", limit="tree_nodes")
        super().add(key)


MAX_GLANCE = 200


def holds_data(node: Any) -> bool:
    """Whether anything below holds weights or could. For one question; `DataSearch` is for many."""
    return next(iter_data(node), None) is not None


def may_hold_data(node: Any) -> bool:
    """As `holds_data`, after a bounded look: what is larger counts as holding some."""
    try:
        return DataSearch(MAX_GLANCE).holds(node)
    except LimitExceededError:
        return True


def resolve(root: Any, path: str) -> Any:
    """The record at a dotted path; keys may themselves contain dots, so the longest fitting key wins.

    None where the path leads nowhere.
    """
    node, rest = root, "" if path == "." else path
    while rest:
        below = dict(named_children(node))
        mapping = as_mapping(node)
        if mapping is not None:
            below |= {step: child for step, child in named_children(mapping) if step not in below}
        fitting = [name for name in below if rest == name or rest.startswith(f"{name}.")]
        if not fitting:
            return None
        name = max(fitting, key=len)
        node, rest = below[name], rest[len(name) + 1 :]
    return node


def names_below(root: Any, limit: int = 10_000) -> set[str]:
    """Last steps of the paths to the tensors below a record; looks at the first `limit` records."""
    names: set[str] = set()
    stack: list[Any] = [root]
    seen: set[int] = set()
    while stack and len(seen) < limit:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for step, child in named_children(as_mapping(node) or node):
            if isinstance(child, (TensorRef, SparseTensor, Opaque)):
                names.add(step)
            elif is_branch(child):
                stack.append(child)
    return names
