"""What pickles of torch before 0.4 mean: tensors, Variables and storages built in other ways than today.

Three releases, three forms; torch still loads the first two (torch/_tensor.py, `Tensor.__setstate__`):

* 0.1.10 to 0.1.12 wrote `torch.FloatTensor()` and a state of (storage, offset, size, stride);
* up to 0.3 `Variable` and `Parameter` came as `Parameter(data)` with a state of (requires_grad, volatile,
  hooks), or empty with (data, gradient, hooks, requires_grad, volatile), of which the gradient is dropped;
* a storage pickled without `torch.save` was a call with the list of its elements (up to 0.4), and so was a
  tensor (before 0.1.10): torch/storage.py and torch/tensor.py, `__reduce__`.

Knows no container. The checked view over a storage is made by the caller's `build`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from ptbin.errors import UnsupportedTensorError
from ptbin.values.dtypes import BY_STORAGE_CLASS, DType
from ptbin.values.nodes import DictNode, Global, Instance, Opaque
from ptbin.values.tensors import InMemory, SparseTensor, Storage, TensorRef, TypedStorage, dense_strides

Build = Callable[[TypedStorage, int, tuple[int, ...], tuple[int, ...]], TensorRef]

MAX_LIST_DEPTH = 64  # as many dimensions as any tensor that ptbin reads

# Elements of a storage that was written as a list, as the struct module packs them, little-endian.
_PACKED = {
    "float32": "f",
    "float64": "d",
    "float16": "e",
    "int8": "b",
    "uint8": "B",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "bool": "?",
}

# Buffers are of torch 2.5; they are made as Parameters are.
_TENSOR_LIKE = (
    ("torch.autograd.variable", "Variable"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
)

_HELD = (TensorRef, SparseTensor, Opaque)


class UnsetTensor(TensorRef):
    """A tensor that the pickle made empty and fills by BUILD."""

    __slots__ = ()

    def become(self, other: TensorRef) -> None:
        """Show what `other` shows. Only for the pickle that is being read: nothing has used it yet."""
        for field in fields(TensorRef):
            object.__setattr__(self, field.name, getattr(other, field.name))


def _unset(dtype: DType) -> UnsetTensor:
    return UnsetTensor(Storage("empty", 0, InMemory(b"")), dtype, (0,), (1,))


class OldTensors:
    """Reducers of the old forms, and the meaning of BUILD on a tensor.

    Args:
        build: a checked view of a storage: storage, offset, shape and stride in elements.
        charge: counts bytes that are about to be copied against a limit.
        remember: is given the bytes of each storage that was written as a list.
    """

    def __init__(
        self, build: Build, charge: Callable[[int], None], remember: Callable[[bytes], None]
    ) -> None:
        self._build = build
        self._charge = charge
        self._remember = remember

    def iter_reducers(self) -> Iterator[tuple[tuple[str, str], Callable[[tuple[Any, ...]], Any]]]:
        """((module, name), reducer) pairs for the pickle machine."""
        for storage_class, dtype in BY_STORAGE_CLASS.items():
            if dtype.name not in _PACKED and dtype.name != "bfloat16":
                continue
            tensor_class = storage_class.removesuffix("Storage") + "Tensor"
            for module in ("torch", "torch.cuda"):
                yield (module, storage_class), self._storage_reducer(Global(module, storage_class), dtype)
                yield (module, tensor_class), self._tensor_reducer(Global(module, tensor_class), dtype)
        for path in _TENSOR_LIKE:
            yield path, self._variable_reducer(Global(*path))

    def set_state(self, target: Any, state: Any) -> bool:
        """What BUILD does to a tensor; False where `target` is not a tensor.

        Raises:
            UnsupportedTensorError: a state of a form that torch does not write, or content that is exchanged.
            CorruptArchiveError, ValueError: a view that does not fit its storage.
        """
        if not isinstance(target, _HELD):
            return False
        if isinstance(state, tuple) and len(state) == 3 and _is_plain_state(state):
            return True
        if isinstance(target, Opaque):
            return True  # its content is refused wherever it is used
        if isinstance(target, UnsetTensor) and isinstance(state, tuple):
            if len(state) == 4:
                storage, offset, shape, stride = state
                found = self._build(storage, offset, shape, stride)
                if target.dtype.name != found.dtype.name:
                    raise ValueError(f"a {target.dtype.name} tensor over a storage of {found.dtype.name}")
                target.become(found)
                return True
            if len(state) == 5 and isinstance(state[0], TensorRef):
                target.become(state[0])
                return True
        raise UnsupportedTensorError(
            f"a tensor is given a state that torch does not write ({_describe(state)}); "
            "load it with the code that saved it and save its state_dict"
        )

    # -- reducers --------------------------------------------------------------------------------

    def _storage_reducer(self, cls: Global, dtype: DType) -> Callable[[tuple[Any, ...]], Any]:
        def reduce(args: tuple[Any, ...]) -> Any:
            if not args:
                return TypedStorage(Storage("empty", 0, InMemory(b"")), dtype)
            if len(args) == 1 and isinstance(args[0], list) and dtype.name in _PACKED:
                return self._packed(args[0], dtype)
            return Instance(cls, args)

        return reduce

    def _tensor_reducer(self, cls: Global, dtype: DType) -> Callable[[tuple[Any, ...]], Any]:
        def reduce(args: tuple[Any, ...]) -> Any:
            if not args:
                return _unset(dtype)
            if len(args) == 1 and isinstance(args[0], list) and dtype.name in _PACKED:
                values, shape = self._flat(args[0])
                return self._build(self._packed(values, dtype), 0, shape, dense_strides(shape))
            return Instance(cls, args)

        return reduce

    def _variable_reducer(self, cls: Global) -> Callable[[tuple[Any, ...]], Any]:
        def reduce(args: tuple[Any, ...]) -> Any:
            if not args:
                return _unset(BY_STORAGE_CLASS["FloatStorage"])
            return args[0] if isinstance(args[0], _HELD) else Instance(cls, args)

        return reduce

    def _packed(self, values: list[Any], dtype: DType) -> TypedStorage:
        """A storage of these elements.

        Raises:
            ValueError: an element that the type cannot hold.
        """
        numbers = (int, float) if dtype.name.startswith("float") else (int,)
        if not all(isinstance(value, numbers) for value in values):
            raise ValueError(f"a {dtype.name} storage with an element that is not a number")
        self._charge(len(values) * dtype.itemsize)
        try:
            data = struct.pack(f"<{len(values)}{_PACKED[dtype.name]}", *values)
        except (struct.error, OverflowError) as error:
            raise ValueError(f"a {dtype.name} storage: {error}") from error
        if data:
            self._remember(data)
        return TypedStorage(Storage("list", len(data), InMemory(data)), dtype)

    def _flat(self, nested: list[Any]) -> tuple[list[Any], tuple[int, ...]]:
        """Elements and shape of nested lists.

        Raises:
            ValueError: rows of different lengths.
        """
        level, shape = nested, [len(nested)]
        while level and isinstance(level[0], list):
            width = len(level[0])
            if len(shape) == MAX_LIST_DEPTH or any(
                not isinstance(row, list) or len(row) != width for row in level
            ):
                raise ValueError("a tensor of rows of different lengths")
            # Counted first: one list may stand in many places.
            self._charge(8 * len(level) * width)
            level = [value for row in level for value in row]
            shape.append(width)
        return level, tuple(shape)


def _is_plain_state(state: tuple[Any, ...]) -> bool:
    """(requires_grad, volatile, backward hooks): nothing that changes what a tensor holds."""
    requires_grad, volatile, hooks = state
    return (
        isinstance(requires_grad, int)
        and (volatile is None or isinstance(volatile, int))
        and (hooks is None or isinstance(hooks, DictNode))
    )


def _describe(state: Any) -> str:
    return f"a tuple of {len(state)}" if isinstance(state, tuple) else type(state).__name__
