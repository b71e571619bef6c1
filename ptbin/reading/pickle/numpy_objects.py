"""What numpy's pickles mean, without numpy: arrays, scalars, dtypes, under old and new module names.

Sources: numpy/core/src/multiarray/methods.c (`array_reduce`, `array_setstate`), descriptor.c
(`arraydescr_reduce`), numpy/_core/numeric.py (`_frombuffer`); numpy 2 moved `numpy.core` to
`numpy._core` and both names are met in files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from ptbin.values.dtypes import dtype_by_name
from ptbin.values.nodes import NdArray, Opaque
from ptbin.values.tensors import InMemory, Storage, TypedStorage, dense_strides, distinct_bytes

# Letters of numpy's array interface that stand for plain numbers.
_PLAIN = re.compile(r"^[<>|=]?[biufcSV?]\d*$")


class DTypeNode:
    """A numpy dtype under construction: BUILD brings the byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code = code.lstrip("<>|=")
        self.order = code[0] if code[:1] in "<>|=" and code else "|"

    def set_state(self, state: Any) -> None:
        # (version, byte order, subdescr, names, fields, elsize, alignment, flags)
        if not isinstance(state, tuple) or len(state) < 5:
            raise ValueError("numpy.dtype state")
        if state[2] is not None or state[3] is not None:
            self.code = "V"  # structured types are not weights
        if isinstance(state[1], str):
            self.order = state[1]

    @property
    def text(self) -> str:
        return self.order + self.code

    @property
    def itemsize(self) -> int:
        if self.code in ("?", "b1"):
            return 1
        digits = self.code[1:]
        return int(digits) if _PLAIN.match(self.code) and digits else 0


class ArrayBuilder(NdArray):
    """`_reconstruct`'s empty array, which BUILD fills."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("|V0", (0,), b"")

    def set_state(self, state: Any) -> None:
        # (version, shape, dtype, fortran order, bytes or list of objects)
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], DTypeNode):
            raise ValueError("numpy.ndarray state")
        shape, dtype, fortran, raw = state[1], state[2], state[3], state[4]
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        if not isinstance(raw, (bytes, bytearray)):
            self.dtype, self.data, self.objects = "|O", b"", raw
            return
        self.shape = _shape(shape)
        self.dtype, self.fortran, self.data = dtype.text, bool(fortran), distinct_bytes(raw)
        if dtype.itemsize and math.prod(self.shape) * dtype.itemsize != len(self.data):
            raise ValueError(f"{len(self.data)} bytes for a {dtype.text} array of shape {self.shape}")


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError("numpy shape")
    return tuple(value)


def _dtype(args: tuple[Any, ...]) -> DTypeNode:
    code = args[0]
    return DTypeNode(code if isinstance(code, str) else "V")


def _scalar(args: tuple[Any, ...]) -> Any:
    dtype = args[0]
    raw = args[1] if len(args) > 1 else b""
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    if not isinstance(dtype, DTypeNode) or not isinstance(raw, bytes):
        return Opaque("numpy scalar", "a numpy scalar of objects", has_data=False)
    if dtype.itemsize and len(raw) != dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes for a {dtype.text} scalar")
    return NdArray(dtype.text, (), raw, scalar=True)


def _frombuffer(args: tuple[Any, ...]) -> NdArray:
    raw, dtype, shape = args[0], args[1], args[2]
    order = args[3] if len(args) > 3 else "C"
    if not isinstance(dtype, DTypeNode) or not isinstance(raw, (bytes, bytearray)):
        raise ValueError("numpy _frombuffer arguments")
    checked = _shape(shape)
    if dtype.itemsize and math.prod(checked) * dtype.itemsize != len(raw):
        raise ValueError(f"{len(raw)} bytes for a {dtype.text} array of shape {checked}")
    return NdArray(dtype.text, checked, distinct_bytes(raw), fortran=order == "F")


def iter_numpy_reducers() -> Iterator[tuple[tuple[str, str], Callable[[tuple[Any, ...]], Any]]]:
    """((module, name), reducer) pairs for the pickle machine."""
    for core in ("numpy.core", "numpy._core"):
        yield (f"{core}.multiarray", "_reconstruct"), lambda args: ArrayBuilder()
        yield (f"{core}.multiarray", "scalar"), _scalar
        yield (f"{core}.numeric", "_frombuffer"), _frombuffer
    yield ("numpy", "dtype"), _dtype


def array_storage(array: NdArray) -> tuple[TypedStorage, tuple[int, ...]]:
    """An array's bytes as a storage, and the stride by which it views them.

    Raises:
        ValueError: an element type that torch does not have.
    """
    order, code = array.dtype[0], array.dtype[1:]
    # bf2 is ours: numpy has no such type, torch writes it widened (`narrow_to_bfloat16`)
    names = {"b1": "bool", "?": "bool", "bf2": "bfloat16"}
    letters = {"f": "float", "i": "int", "u": "uint", "c": "complex"}
    dtype = dtype_by_name(names.get(code) or (letters.get(code[:1], "?") + str(8 * int(code[1:] or 0))))
    if dtype is None:
        raise ValueError(f"numpy type {array.dtype}")
    stride = dense_strides(array.shape)
    if array.fortran:
        stride = tuple(reversed(dense_strides(tuple(reversed(array.shape)))))
    storage = Storage("numpy", len(array.data), InMemory(array.data), big_endian=order == ">")
    return TypedStorage(storage, dtype), stride


def narrow_to_bfloat16(array: NdArray) -> None:
    """Make a float32 array the bfloat16 one it was widened from; nothing where that would not be exact."""
    high, low = (0, 2) if array.dtype[0] == ">" else (2, 0)
    data = array.data
    if any(data[low::4]) or any(data[low + 1 :: 4]):
        return
    narrow = bytearray(len(data) // 2)
    narrow[0::2], narrow[1::2] = data[high::4], data[high + 1 :: 4]
    array.dtype, array.data = array.dtype[0] + "bf2", bytes(narrow)
