"""What a pickle says, as inert records.

The pickle machine builds these instead of objects. Numbers, strings, None, lists and tuples stay
Python's own; everything that could have behaviour becomes one of the classes here. None of them
hashes, compares or prints its children: a graph of 10^9 leaves fits into 229 bytes of pickle, and
code that walks one must remember nodes by identity (`iter_nodes` does).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ptbin.values.tensors import TensorRef


class Global:
    """A name the pickle would import: `module`, `name`, and where in the pickle it stands."""

    __slots__ = ("module", "name", "offset")

    def __init__(self, module: str, name: str, offset: int = -1) -> None:
        self.module = module
        self.name = name
        self.offset = offset

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        return f"Global({self.path!r})"


class DictNode:
    """A mapping as pairs in file order; keys may be anything, later pairs win as in Python.

    `kind` is the class that would be built (`dict`, `OrderedDict`, `defaultdict`, `Counter`), `state`
    what BUILD would put into its `__dict__` (torch keeps `_metadata` there).
    """

    __slots__ = ("kind", "pairs", "state")

    def __init__(self, kind: str = "dict", pairs: list[tuple[Any, Any]] | None = None) -> None:
        self.kind = kind
        self.pairs: list[tuple[Any, Any]] = [] if pairs is None else pairs
        self.state: Any = None

    def get(self, key: str, default: Any = None) -> Any:
        """Value of the last pair whose key is this string."""
        for k, v in reversed(self.pairs):
            if type(k) is str and k == key:
                return v
        return default

    def by_name(self) -> dict[str, Any]:
        """The pairs with string keys; duplicates resolved as Python would (last value, first place)."""
        return {k: v for k, v in self.pairs if type(k) is str}


class SetNode:
    """A set or frozenset; its items need not be hashable."""

    __slots__ = ("frozen", "items")

    def __init__(self, items: list[Any], *, frozen: bool = False) -> None:
        self.items = items
        self.frozen = frozen


class Instance:
    """The result of calling or instantiating `cls`, not called: arguments and what followed.

    `state` is BUILD's argument (the last one), `items` and `pairs` what APPENDS and SETITEMS added.
    """

    __slots__ = ("args", "cls", "items", "kwargs", "pairs", "state")

    def __init__(self, cls: Any, args: Any = (), kwargs: Any = None) -> None:
        self.cls = cls
        self.args = args
        self.kwargs = kwargs
        self.state: Any = None
        self.items: list[Any] = []
        self.pairs: list[tuple[Any, Any]] = []

    @property
    def class_path(self) -> str:
        return self.cls.path if isinstance(self.cls, Global) else "?"

    def attributes(self) -> DictNode | None:
        """Instance attributes: the state where it is a mapping, or the mappings in a (dict, slots) pair.

        Classes with `__slots__` leave either of the two empty (copyreg, `__reduce_ex__` of protocol 2);
        torch.fx's `reduce_graph_module` takes the attributes as its first argument instead.
        """
        state = self.state
        if (
            state is None
            and self.class_path.startswith("torch.fx.")
            and isinstance(self.args, tuple)
            and self.args
        ):
            state = self.args[0]
        if isinstance(state, tuple) and len(state) == 2:
            parts = [part for part in state if isinstance(part, DictNode)]
            if parts and all(part is None or isinstance(part, DictNode) for part in state):
                return parts[0] if len(parts) == 1 else DictNode("dict", [*parts[0].pairs, *parts[1].pairs])
            if isinstance(state[0], DictNode):
                return state[0]
        return state if isinstance(state, DictNode) else None


class NdArray:
    """A numpy array or scalar: dtype string (`<f4`), shape, memory order, raw bytes.

    `objects` are the elements of an array of Python objects, which has no bytes.
    """

    __slots__ = ("data", "dtype", "fortran", "objects", "scalar", "shape")

    def __init__(
        self, dtype: str, shape: tuple[int, ...], data: bytes, *, fortran: bool = False, scalar: bool = False
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.data = data
        self.fortran = fortran
        self.scalar = scalar
        self.objects: Any = None


class Opaque:
    """A tensor whose weights ptbin does not take as bytes.

    Attributes:
        kind: what it is; reason: why it cannot be taken and what to do instead.
        has_data: False where there is nothing to lose (a meta tensor).
        contents: what it was made of; the storages below count as its own.
    """

    __slots__ = ("contents", "has_data", "kind", "reason")

    def __init__(self, kind: str, reason: str, *, has_data: bool = True, contents: Any = None) -> None:
        self.kind = kind
        self.reason = reason
        self.has_data = has_data
        self.contents = contents


class TorchSize(tuple[int, ...]):
    """A `torch.Size`."""

    __slots__ = ()


def children(node: Any) -> Iterator[Any]:
    """Nodes directly below, in file order, keys included."""
    if isinstance(node, DictNode):
        for key, value in node.pairs:
            if type(key) is not str:
                yield key
            yield value
        if node.state is not None:
            yield node.state
    elif isinstance(node, (list, tuple)):
        yield from node
    elif isinstance(node, Instance):
        yield node.cls
        yield node.args
        if node.kwargs is not None:
            yield node.kwargs
        yield node.state
        yield from node.items
        for key, value in node.pairs:
            if type(key) is not str:
                yield key
            yield value
    elif isinstance(node, SetNode):
        yield from node.items
    elif isinstance(node, Opaque):
        yield node.contents
    elif isinstance(node, NdArray):
        yield node.objects
    elif isinstance(node, TensorRef):
        for _, value in node.attributes:
            yield value


MAX_DIMENSIONS = 64
"""torch itself has no limit; numpy, and with it most readers of weights, stops here."""
MAX_EXTENT = 1 << 48
"""More elements, or bytes, than any tensor or file has along one dimension."""


def entry_in(node: Any, key: str) -> Any:
    """What a mapping has under a key; None where there is neither."""
    return node.get(key) if isinstance(node, DictNode) else None


def sizes_in(value: Any) -> tuple[int, ...] | None:
    """A list or tuple of sizes that a file states; None where it is not one that a tensor can have."""
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        return None
    return tuple(value) if all(type(n) is int and 0 <= n < MAX_EXTENT for n in value) else None


_LEAVES = (str, bytes, int, float, bool, complex, type(None), Global)


def iter_nodes(root: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Every node below `root` once, parents first; linear in the nodes, whatever the graph unfolds to.

    `seen` holds the identities met by earlier walks, which are passed over, and takes up those of this one.
    """
    seen = set() if seen is None else seen
    if id(root) in seen:
        return
    seen.add(id(root))
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        for child in children(node):
            if isinstance(child, _LEAVES) or id(child) in seen:
                continue
            seen.add(id(child))
            stack.append(child)
