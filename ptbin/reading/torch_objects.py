"""What torch's pickles mean: the constructors that stand between a storage and a tensor.

Turns `torch._utils._rebuild_*` calls into `TensorRef`s (checked: every stride and offset lies inside
the storage, every count is bounded), and the handful of builtins that torch's pickles use into plain
values. Sources: torch/_utils.py, torch/_tensor.py (`_reduce_ex_internal`), torch/storage.py,
torch/serialization.py, 2.13; `_rebuild_tensor` (v1) and `_rebuild_xla_tensor` are of older releases.

Knows no container: a storage arrives through `persistent` or `load_nested`, both given by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ptbin.dtypes import BY_STORAGE_CLASS, DType, dtype_by_name
from ptbin.errors import CorruptArchiveError, LimitExceededError, UnsupportedTensorError
from ptbin.nodes import DictNode, Global, Instance, NdArray, Opaque, SetNode, TorchSize
from ptbin.options import Limits
from ptbin.reading.numpy_objects import iter_numpy_reducers
from ptbin.reading.wrappers import WRAPPER, read_wrapper
from ptbin.tensors import InMemory, SparseTensor, Storage, TensorRef, TypedStorage, dense_strides

__all__ = ["TorchVocabulary", "storage_dtype"]

# torch itself has no limit; numpy, and with it most readers of weights, stops at 64.
MAX_DIMENSIONS = 64

Reduce = Callable[[tuple[Any, ...]], Any]

_PER_TENSOR = ((float, int),)
_PER_CHANNEL = ((TensorRef, TensorRef, int),)
QUANTIZER_SCHEMES: dict[str, tuple[tuple[type, ...], ...]] = {
    "per_tensor_affine": _PER_TENSOR,
    "per_tensor_symmetric": _PER_TENSOR,
    "per_channel_affine": _PER_CHANNEL,
    "per_channel_symmetric": _PER_CHANNEL,
    "per_channel_affine_float_qparams": _PER_CHANNEL,
}
"""Schemes of `torch._utils._rebuild_qtensor` and the types of what follows them."""

_SPARSE_PARTS = {
    "torch.sparse_coo": ("indices", "values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}


def storage_dtype(kind: Any) -> DType:
    """Element type behind a storage class as a persistent id names it; untyped storages count bytes.

    Raises:
        ValueError: no storage class.
    """
    if not isinstance(kind, Global):
        raise ValueError("a storage class that is no global")
    name = kind.name.rsplit(".", 1)[-1]
    if kind.module in ("torch.storage", "torch") and name in ("UntypedStorage", "_UntypedStorage"):
        return BY_STORAGE_CLASS["ByteStorage"]
    dtype = BY_STORAGE_CLASS.get(name)
    if dtype is None or kind.module.split(".")[0] != "torch":
        raise ValueError(f"{kind.path} is no storage class")
    return dtype


class TorchVocabulary:
    """The reducer table for one checkpoint."""

    def __init__(self, limits: Limits, load_nested: Callable[[bytes], Any]) -> None:
        self._limits = limits
        self._load_nested = load_nested
        self.tensors_built = 0
        self._copied_nbytes = 0
        self._unfolded_nbytes = 0

    def reducers(self) -> Mapping[tuple[str, str], Reduce]:
        table: dict[tuple[str, str], Reduce] = dict(iter_numpy_reducers())
        utils: dict[str, Reduce] = {
            "_rebuild_tensor": self._tensor_v1,
            "_rebuild_tensor_v2": self._tensor_v1,
            "_rebuild_tensor_v3": self._tensor_v3,
            "_rebuild_parameter": lambda args: args[0],
            "_rebuild_parameter_with_state": _with_state,
            "_rebuild_qtensor": self._qtensor,
            "_rebuild_sparse_tensor": self._sparse,
            "_rebuild_sparse_csr_tensor": self._sparse,
            "_rebuild_device_tensor_from_numpy": self._from_numpy,
            "_rebuild_xla_tensor": self._from_numpy,
            "_rebuild_device_tensor_from_cpu_tensor": _from_cpu_tensor,
            "_rebuild_meta_tensor_no_storage": lambda args: Opaque(
                "meta tensor", "a meta tensor has a shape and no data", has_data=False
            ),
            "_rebuild_nested_tensor": lambda args: Opaque(
                "nested tensor", "nested tensors are not supported"
            ),
            "_rebuild_wrapper_subclass": lambda args: read_wrapper(args, None),
        }
        for name, reducer in utils.items():
            table["torch._utils", name] = reducer
        for module in ("torch._tensor", "torch.tensor"):
            table[module, "_rebuild_from_type"] = self._from_type
            table[module, "_rebuild_from_type_v2"] = self._from_type
        table["torch.nn.parameter", "Parameter"] = self._parameter
        table["torch.nn.parameter", "Buffer"] = self._parameter
        table["torch.storage", "_load_from_bytes"] = lambda args: self._load_nested(self._bytes(args[0]))
        table["torch.serialization", "_get_layout"] = lambda args: Global("torch.layout", args[0])
        table["torch", "Size"] = lambda args: TorchSize(_ints(args[0], "size"))
        table["collections", "OrderedDict"] = lambda args: self._copy_dict("OrderedDict", args)
        table["collections", "defaultdict"] = lambda args: DictNode("defaultdict")
        table["collections", "Counter"] = lambda args: self._copy_dict("Counter", args)
        table["_codecs", "encode"] = self._encode
        for builtins in ("builtins", "__builtin__"):
            table[builtins, "dict"] = lambda args: self._copy_dict("dict", args)
            table[builtins, "list"] = lambda args: list(self._items(args))
            table[builtins, "tuple"] = lambda args: tuple(self._items(args))
            table[builtins, "set"] = lambda args: SetNode(list(self._items(args)))
            table[builtins, "frozenset"] = lambda args: SetNode(list(self._items(args)), frozen=True)
            # protocol 2 writes empty bytes as a call without arguments
            table[builtins, "bytes"] = lambda args: self._bytes(args[0]) if args else b""
            table[builtins, "bytearray"] = lambda args: (
                bytearray(self._bytes(args[0])) if args else bytearray()
            )
            table[builtins, "complex"] = lambda args: complex(*args)
        return table

    # -- tensors -----------------------------------------------------------------------------

    def tensor(
        self,
        typed: Any,
        dtype: DType | None,
        storage_offset: Any,
        shape: Any,
        stride: Any,
        quantizer: tuple[Any, ...] | None = None,
        metadata: Any = None,
    ) -> TensorRef:
        """A checked view.

        Raises:
            CorruptArchiveError: the view does not lie inside its storage.
            LimitExceededError: an expanded view larger than `Limits.expanded_nbytes`.
        """
        if not isinstance(typed, TypedStorage):
            raise ValueError("a tensor without a storage")
        element = dtype or typed.dtype
        sizes, strides = _ints(shape, "shape"), _ints(stride, "stride")
        if len(sizes) != len(strides) or len(sizes) > MAX_DIMENSIONS:
            raise ValueError(f"{len(sizes)} sizes and {len(strides)} strides")
        if type(storage_offset) is not int or storage_offset < 0:
            raise ValueError("storage offset")
        self.tensors_built += 1
        if self.tensors_built > self._limits.tensors:
            raise LimitExceededError(f"more than {self._limits.tensors} tensors")
        ref = TensorRef(
            typed.storage,
            element,
            sizes,
            strides,
            storage_offset + typed.view_offset,
            quantizer,
            _flags(metadata),
        )
        if element.per_unit > 1 and not (ref.contiguous and ref.storage_offset % element.per_unit == 0):
            raise UnsupportedTensorError(f"a {element.name} tensor that begins or steps inside a byte")
        if ref.numel:
            first, end = ref.span
            if end > typed.storage.nbytes:
                raise CorruptArchiveError(
                    f"a {element.name} tensor of shape {list(sizes)}, stride {list(strides)} and offset "
                    f"{storage_offset} reaches byte {end} of storage {typed.storage.key!r}, "
                    f"which has {typed.storage.nbytes}"
                )
            self._unfolded_nbytes += max(ref.nbytes - (end - first), 0)
            if self._unfolded_nbytes > self._limits.expanded_nbytes:
                raise LimitExceededError(
                    f"a tensor of shape {list(sizes)} unfolds {end - first} stored bytes to {ref.nbytes}; "
                    f"the limit is {self._limits.expanded_nbytes}"
                )
        return ref

    def _tensor_v1(self, args: tuple[Any, ...]) -> TensorRef:
        # v2 adds requires_grad, hooks, and lately a mapping of lazy operations
        storage, offset, shape, stride = args[:4]
        return self.tensor(storage, None, offset, shape, stride, metadata=args[6] if len(args) > 6 else None)

    def _tensor_v3(self, args: tuple[Any, ...]) -> TensorRef:
        storage, offset, shape, stride = args[:4]
        metadata = args[7] if len(args) > 7 else None
        return self.tensor(storage, _dtype_argument(args[6]), offset, shape, stride, metadata=metadata)

    def _qtensor(self, args: tuple[Any, ...]) -> TensorRef:
        storage, offset, shape, stride, params = args[:5]
        if not isinstance(params, tuple) or not params or not isinstance(params[0], Global):
            raise ValueError("quantizer parameters")
        scheme = params[0].name if params[0].module == "torch" else ""
        kinds = tuple(type(value) for value in params[1:])
        plain = all(not isinstance(v, TensorRef) or v.quantizer is None for v in params[1:])
        if scheme not in QUANTIZER_SCHEMES or kinds not in QUANTIZER_SCHEMES[scheme] or not plain:
            raise ValueError("quantizer parameters")
        return self.tensor(storage, None, offset, shape, stride, (params[0].name, *params[1:]))

    def _sparse(self, args: tuple[Any, ...]) -> SparseTensor:
        layout, data = args[0], args[1]
        if not isinstance(layout, Global) or not isinstance(data, tuple):
            raise ValueError("sparse tensor arguments")
        name = layout.name if layout.name.startswith("torch.") else f"torch.{layout.name}"
        names = _SPARSE_PARTS.get(name)
        if names is None:
            raise ValueError(f"layout {name}")
        parts = data[: len(names)]
        if len(parts) != len(names) or not all(isinstance(part, TensorRef) for part in parts):
            raise ValueError("sparse tensor parts")
        shape = _ints(data[len(names)], "shape")
        coalesced = data[len(names) + 1] if len(data) > len(names) + 1 else None
        return SparseTensor(
            name,
            tuple(zip(names, parts, strict=True)),
            shape,
            coalesced if isinstance(coalesced, bool) else None,
        )

    def _from_numpy(self, args: tuple[Any, ...]) -> TensorRef:
        array = args[0]
        if not isinstance(array, NdArray):
            raise ValueError("a device tensor without its array")
        ref = self.array_as_tensor(array)
        if len(args) > 1 and _dtype_argument(args[1]) != ref.dtype:
            raise UnsupportedTensorError(f"a device tensor stored as {ref.dtype.name} to be cast on loading")
        return ref

    def array_as_tensor(self, array: NdArray) -> TensorRef:
        """A numpy array as a tensor over bytes in memory.

        Raises:
            ValueError: an element type that torch has not.
        """
        order, code = array.dtype[0], array.dtype[1:]
        names = {"b1": "bool", "?": "bool"}
        letters = {"f": "float", "i": "int", "u": "uint", "c": "complex"}
        name = names.get(code) or (letters.get(code[:1], "?") + str(8 * int(code[1:] or 0)))
        dtype = dtype_by_name(name)
        if dtype is None:
            raise ValueError(f"numpy type {array.dtype}")
        stride = dense_strides(array.shape)
        if array.fortran:
            stride = tuple(reversed(dense_strides(tuple(reversed(array.shape)))))
        storage = Storage("numpy", len(array.data), InMemory(array.data), big_endian=order == ">")
        return self.tensor(TypedStorage(storage, dtype), dtype, 0, array.shape, stride)

    def _from_type(self, args: tuple[Any, ...]) -> Any:
        # (function, type, arguments, state): the subclass falls away, the data stay
        function, inner = args[0], args[2]
        if isinstance(function, Global) and function.path == WRAPPER and isinstance(inner, tuple):
            return read_wrapper(inner, args[3] if len(args) > 3 else None)
        _refuse_content(args[3] if len(args) > 3 else None)
        if isinstance(function, Global) and isinstance(inner, tuple):
            reducer = self.reducers().get((function.module, function.name))
            if reducer is not None:
                return reducer(inner)
        return Instance(function, inner)

    def _parameter(self, args: tuple[Any, ...]) -> Any:
        if args and isinstance(args[0], (TensorRef, SparseTensor, Opaque)):
            return args[0]
        return Instance(Global("torch.nn.parameter", "Parameter"), args)

    # -- builtins, each copy charged: one argument may be named by a million calls -------------------

    def charge(self, nbytes: int) -> None:
        """Count what a constructor copies. Raises LimitExceededError beyond `Limits.copied_nbytes`."""
        self._copied_nbytes += nbytes
        if self._copied_nbytes > self._limits.copied_nbytes:
            raise LimitExceededError(f"constructor calls copy more than {self._limits.copied_nbytes} bytes")

    def _items(self, args: tuple[Any, ...]) -> Any:
        if not args:
            return ()
        value = args[0].items if isinstance(args[0], SetNode) else args[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError("a container of something that is no sequence")
        self.charge(8 * len(value))
        return value

    def _bytes(self, value: Any) -> bytes:
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
        raise ValueError(f"{kind} of something that is no mapping")


# Attributes of a tensor that exchange its content when they are set.
_CONTENT = frozenset(["data", "real", "imag", "_data", "grad_fn", "names"])


def _refuse_content(state: Any) -> None:
    """Refuse Python attributes that would change what the tensor holds."""
    parts = state if isinstance(state, tuple) else (state,)
    for part in parts:
        if part is None:
            continue
        if not isinstance(part, DictNode) or not _CONTENT.isdisjoint(part.by_name()):
            raise ValueError("tensor attributes that would exchange its content")


def _with_state(args: tuple[Any, ...]) -> Any:
    _refuse_content(args[3])
    return args[0]


def _from_cpu_tensor(args: tuple[Any, ...]) -> Any:
    tensor = args[0]
    if isinstance(tensor, TensorRef) and _dtype_argument(args[1]) != tensor.dtype:
        raise UnsupportedTensorError(f"a device tensor stored as {tensor.dtype.name} to be cast on loading")
    return tensor


def _flags(metadata: Any) -> tuple[str, ...]:
    """Lazy operations on a tensor (torch/_utils.py, `_set_obj_state`: the keys `conj` and `neg`)."""
    if metadata is None:
        return ()
    if not isinstance(metadata, DictNode):
        raise ValueError("tensor metadata")
    return tuple(name for name in ("conj", "neg") if metadata.get(name) is True)


def _dtype_argument(value: Any) -> DType:
    dtype = dtype_by_name(value.name) if isinstance(value, Global) and value.module == "torch" else None
    if dtype is None:
        raise ValueError("an element type that torch does not have")
    return dtype


def _ints(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is int and what == "shape":
        return (value,)
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"{what} is no tuple")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        # Only numbers are shown: an entry may be a graph of 10^9 leaves.
        shown = [n if type(n) is int and abs(n) < 1 << 64 else type(n).__name__ for n in value[:8]]
        raise CorruptArchiveError(f"{what} {shown} has a negative, too large or non-integer entry")
    return tuple(value)
