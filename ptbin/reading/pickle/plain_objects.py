"""What the few builtins mean that torch's pickles call: containers, bytes, text. Each copy is charged.

One argument may be named by a million calls, so what constructors copy counts against a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ptbin.errors import LimitExceededError
from ptbin.options import Limits
from ptbin.values.nodes import DictNode, SetNode

Reduce = Callable[[tuple[Any, ...]], Any]


class PlainObjects:
    """Reducers for one checkpoint.

    Attributes:
        copied_nbytes: what they have copied so far.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.copied_nbytes = 0

    def iter_reducers(self) -> Iterator[tuple[tuple[str, str], Reduce]]:
        """((module, name), reducer) pairs for the pickle machine."""
        yield ("collections", "OrderedDict"), lambda args: self._copy_dict("OrderedDict", args)
        yield ("collections", "defaultdict"), lambda args: DictNode("defaultdict")
        yield ("collections", "Counter"), lambda args: self._copy_dict("Counter", args)
        yield ("_codecs", "encode"), self._encode
        constructors: dict[str, Reduce] = {
            "dict": lambda args: self._copy_dict("dict", args),
            "list": lambda args: list(self._items(args)),
            "tuple": lambda args: tuple(self._items(args)),
            "set": lambda args: SetNode(list(self._items(args))),
            "frozenset": lambda args: SetNode(list(self._items(args)), frozen=True),
            # protocol 2 writes empty bytes as a call without arguments
            "bytes": lambda args: self.bytes_of(args[0]) if args else b"",
            "bytearray": lambda args: bytearray(self.bytes_of(args[0]) if args else b""),
            "complex": lambda args: complex(*args),
        }
        for name, reducer in constructors.items():
            yield ("builtins", name), reducer
            yield ("__builtin__", name), reducer

    def charge(self, nbytes: int) -> None:
        """Count what a constructor copies. Raises LimitExceededError beyond `Limits.copied_nbytes`."""
        self.copied_nbytes += nbytes
        if self.copied_nbytes > self._limits.copied_nbytes:
            raise LimitExceededError(
                f"constructor calls copy more than {self._limits.copied_nbytes} bytes", limit="copied_nbytes"
            )

    def _items(self, args: tuple[Any, ...]) -> Any:
        if not args:
            return ()
        value = args[0].items if isinstance(args[0], SetNode) else args[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError("a container of something that is not a sequence")
        self.charge(8 * len(value))
        return value

    def bytes_of(self, value: Any) -> bytes:
        """Bytes, or text that stands for some."""
        if not isinstance(value, (str, bytes, bytearray)):
            raise ValueError("bytes expected")
        self.charge(len(value))
        return value.encode("latin1") if isinstance(value, str) else bytes(value)

    def _encode(self, args: tuple[Any, ...]) -> bytes:
        # protocol 2 writes bytes as _codecs.encode(text, 'latin1') (CPython, Lib/pickle.py, save_bytes)
        text, encoding = args[0], args[1] if len(args) > 1 else "latin1"
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise ValueError("_codecs.encode arguments")
        self.charge(len(text))
        return text.encode("latin1")

    def _copy_dict(self, kind: str, args: tuple[Any, ...]) -> DictNode:
        if not args:
            return DictNode(kind)
        value = args[0]
        if isinstance(value, DictNode):
            self.charge(16 * len(value.pairs))
            return DictNode(kind, list(value.pairs))
        # Python 2 pickled an OrderedDict as a list of [key, value] lists
        if isinstance(value, (list, tuple)) and all(
            isinstance(p, (list, tuple)) and len(p) == 2 for p in value
        ):
            self.charge(16 * len(value))
            return DictNode(kind, [(p[0], p[1]) for p in value])
        raise ValueError(f"{kind} of something that is not a mapping")
