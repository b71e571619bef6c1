"""What torch's pickles mean: the constructors that stand between a storage and a tensor.

Turns `torch._utils._rebuild_*` calls into `TensorRef`s (checked: every stride and offset lies inside
the storage, every count is bounded), and the handful of builtins that torch's pickles use into plain
values. Sources: torch/_utils.py, torch/_tensor.py (`_reduce_ex_internal`), torch/storage.py,
torch/serialization.py, 2.13; `_rebuild_tensor` (v1) and `_rebuild_xla_tensor` are of older releases.

Knows no container: a storage arrives through `persistent` or `load_nested`, both given by the caller.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ptbin.errors import (
    CorruptArchiveError,
    LimitExceededError,
    UnsupportedTensorError,
)
from ptbin.options import Limits
from ptbin.reading.pickle.meshes import Grids
from ptbin.reading.pickle.numpy_objects import iter_numpy_reducers
from ptbin.reading.pickle.old_tensors import OldTensors
from ptbin.reading.pickle.wrappers import placement_of, read_wrapper
from ptbin.reading.tree import glance
from ptbin.values.dtypes import BY_STORAGE_CLASS, DType, dtype_by_name
from ptbin.values.nodes import DictNode, Global, NdArray, Opaque, SetNode, TorchSize
from ptbin.values.tensors import InMemory, SparseTensor, Storage, TensorRef, TypedStorage, dense_strides

__all__ = ["TorchVocabulary", "storage_dtype"]

# torch itself has no limit; numpy, and with it most readers of weights, stops at 64.
MAX_DIMENSIONS = 64
MAX_KNOWN = 4096

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


# Packages for other devices whose tensors are pickled as torch's own, arguments in the same order, by a
# function of theirs: (storage, offset, size, stride, requires_grad, hooks, what the device wants to know).
# torch_npu's is torch_npu/utils/storage.py, `_rebuild_npu_tensor`; what it keeps in a layout of its own it
# saves as plain.
_VENDORS = frozenset(["torch_npu", "torch_mlu", "torch_musa", "torch_gcu", "habana_frameworks", "torch_xla"])
_VENDOR_REBUILD = re.compile(r"^_?rebuild_\w*tensor(_v2)?$")


class _Reducers(dict[tuple[str, str], Reduce]):
    """The table by (module, name), with vendors' functions under whatever module they are in."""

    def __init__(self, table: Mapping[tuple[str, str], Reduce], vendor: Reduce) -> None:
        super().__init__(table)
        self._vendor = vendor

    def get(self, key: tuple[str, str], default: Any = None) -> Any:
        found = super().get(key)
        if found is None and key[0].partition(".")[0] in _VENDORS and _VENDOR_REBUILD.match(key[1]):
            return self._vendor
        return found if found is not None else default


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
        self.limits = limits
        self._load_nested = load_nested
        self.tensors_built = 0
        self._copied_nbytes = 0
        self._unfolded_nbytes = 0
        self._dense: dict[tuple[int, int, int], tuple[tuple[int, ...], tuple[int, ...], DType, int]] = {}
        # Shapes that were checked once, with their bytes, by identity: thousands of tensors share a few.
        self._arrays: list[NdArray] = []
        self._nested: list[bytes] = []
        self.placements: list[Any] = []
        """Of distributed tensors that were read as their local ones: meshes and placements, else lost."""
        self.grids = Grids()
        self._table: Mapping[tuple[str, str], Reduce] | None = None
        self._old = OldTensors(self._view, self.charge, self._nested.append)

    def blobs(self) -> Iterator[bytes | bytearray]:
        """Every run of bytes that pickles carried inside: numpy arrays, storages of nested files."""
        yield from self._nested
        for array in self._arrays:
            if array.data and not array.scalar:
                yield array.data

    def mark(self) -> tuple[int, int, int, int, int]:
        """Where the counts stand, for `rewind` after a run that broke off and will be made anew."""
        counts = (self.tensors_built, self._copied_nbytes, self._unfolded_nbytes)
        return (*counts, len(self._arrays), len(self._nested))

    def rewind(self, mark: tuple[int, int, int, int, int]) -> None:
        """Forget what was built since `mark`."""
        self.tensors_built, self._copied_nbytes, self._unfolded_nbytes, arrays, nested = mark
        del self._arrays[arrays:], self._nested[nested:]

    def take_over(self, inner: TorchVocabulary, storages: Iterable[Storage] = ()) -> None:
        """Count what a nested file held as part of this one."""
        self._arrays.extend(inner._arrays)
        self._nested.extend(inner._nested)
        self._nested.extend(s.place.data for s in storages if isinstance(s.place, InMemory))

    def _remembered(self, build: Reduce) -> Reduce:
        def reducer(args: tuple[Any, ...]) -> Any:
            made = build(args)
            if isinstance(made, NdArray):
                self._arrays.append(made)
            return made

        return reducer

    def reducers(self) -> Mapping[tuple[str, str], Reduce]:
        """The table, made once: every distributed tensor looks into it, and every file of a checkpoint."""
        if self._table is None:
            self._table = self._made_table()
        return self._table

    def _made_table(self) -> Mapping[tuple[str, str], Reduce]:
        table: dict[tuple[str, str], Reduce] = {
            name: self._remembered(build) for name, build in iter_numpy_reducers()
        }
        table.update(self._old.iter_reducers())
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
                "nested tensor",
                "it has no plain layout; save `[t.clone() for t in nested.unbind()]` under names instead",
                contents=args,
            ),
            "_rebuild_wrapper_subclass": lambda args: self._unwrapped("wrapper subclass", args, args, None),
        }
        for name, reducer in utils.items():
            table["torch._utils", name] = reducer
        for module in ("torch._tensor", "torch.tensor"):
            table[module, "_rebuild_from_type"] = self._from_type
            table[module, "_rebuild_from_type_v2"] = self._from_type
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
        return _Reducers(table, self._vendor_tensor)

    def set_state(self, target: Any, state: Any) -> bool:
        """What BUILD does to a finished tensor (`OldTensors.set_state`)."""
        return self._old.set_state(target, state)

    # -- tensors -----------------------------------------------------------------------------

    def _view(self, storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef:
        return self.tensor(storage, None, offset, shape, stride)

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
        known = self._dense.get((id(shape), id(stride), id(element)))
        if known is not None and type(storage_offset) is int and storage_offset >= 0:
            begin = storage_offset + typed.view_offset
            if begin * element.itemsize + known[3] <= typed.storage.nbytes:
                self._count_tensor()
                return TensorRef(
                    typed.storage, element, known[0], known[1], begin, quantizer, _flags(metadata)
                )
        sizes, strides = _ints(shape, "shape"), _ints(stride, "stride")
        if len(sizes) != len(strides) or len(sizes) > MAX_DIMENSIONS:
            raise ValueError(f"{len(sizes)} sizes and {len(strides)} strides")
        if type(storage_offset) is not int or storage_offset < 0:
            raise ValueError("storage offset")
        self._count_tensor()
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
            if self._unfolded_nbytes > self.limits.expanded_nbytes:
                raise LimitExceededError(
                    f"a tensor of shape {list(sizes)} unfolds {end - first} stored bytes to {ref.nbytes}; "
                    f"the limit is {self.limits.expanded_nbytes}"
                )
            if (
                sizes is shape
                and strides is stride
                and element.per_unit == 1
                and end - first == ref.nbytes
                and len(self._dense) < MAX_KNOWN
            ):
                self._dense[id(shape), id(stride), id(element)] = (sizes, strides, element, ref.nbytes)
        return ref

    def _count_tensor(self) -> None:
        self.tensors_built += 1
        if self.tensors_built > self.limits.tensors:
            raise LimitExceededError(f"more than {self.limits.tensors} tensors")

    def _tensor_v1(self, args: tuple[Any, ...]) -> TensorRef:
        # v2 adds requires_grad, hooks, and lately a mapping of lazy operations
        storage, offset, shape, stride = args[:4]
        return self.tensor(storage, None, offset, shape, stride, metadata=args[6] if len(args) > 6 else None)

    def _vendor_tensor(self, args: tuple[Any, ...]) -> Any:
        if len(args) >= 4 and isinstance(args[0], TypedStorage):
            return self.tensor(args[0], None, *args[1:4])
        return _wrapped("a device's own kind", args)

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

    def _from_numpy(self, args: tuple[Any, ...]) -> TensorRef | Opaque:
        array = args[0]
        if not isinstance(array, NdArray):
            raise ValueError("a device tensor without its array")
        target = _dtype_argument(args[1]) if len(args) > 1 else None
        if target is not None and target.name == "bfloat16" and array.dtype[1:] == "f4":
            # numpy has no bfloat16: torch/_tensor.py, `_reduce_ex_internal`, writes it widened to float32
            _narrow_to_bfloat16(array)
        ref = self.array_as_tensor(array)
        if target is not None and target != ref.dtype:
            return _to_be_cast(ref, target)
        return ref

    def array_as_tensor(self, array: NdArray) -> TensorRef:
        """A numpy array as a tensor over bytes in memory.

        Raises:
            ValueError: an element type that torch has not.
        """
        order, code = array.dtype[0], array.dtype[1:]
        # bf2 is ours: numpy has no such type, torch writes it widened (`_from_numpy`)
        names = {"b1": "bool", "?": "bool", "bf2": "bfloat16"}
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

    def _unwrapped(self, name: str, contents: Any, args: tuple[Any, ...], state: Any) -> Any:
        """A distributed tensor as `wrappers` reads it, any other wrapper as what cannot be taken."""
        found = read_wrapper(args, state, self.grids)
        if isinstance(found, TensorRef):
            self.placements.append(placement_of(state))
        return _wrapped(name, contents) if found is None else found

    def _from_type(self, args: tuple[Any, ...]) -> Any:
        # (function, type, arguments, state): the subclass falls away, the data stay
        function, kind, inner = args[0], args[1], args[2]
        state = args[3] if len(args) > 3 else None
        name = kind.path if isinstance(kind, Global) else "a subclass"
        reducer = (
            self.reducers().get((function.module, function.name)) if isinstance(function, Global) else None
        )
        if reducer is None or not isinstance(inner, tuple):
            return _wrapped(name, args)
        if isinstance(function, Global) and function.name == "_rebuild_wrapper_subclass":
            return self._unwrapped(name, args, inner, state)
        return _with_attributes(reducer(inner), state, name)

    # -- builtins, each copy charged: one argument may be named by a million calls -------------------

    def charge(self, nbytes: int) -> None:
        """Count what a constructor copies. Raises LimitExceededError beyond `Limits.copied_nbytes`."""
        self._copied_nbytes += nbytes
        if self._copied_nbytes > self.limits.copied_nbytes:
            raise LimitExceededError(f"constructor calls copy more than {self.limits.copied_nbytes} bytes")

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


def _wrapped(name: str, contents: Any) -> Opaque:
    """A tensor subclass around others (DTensor, optimum-quanto, torchao): `name` is its class."""
    library = name.partition(".")[0]
    unwrap = (
        "`full_tensor()`"
        if name.startswith("torch.distributed")
        else "its `dequantize()` or a plain `state_dict()`"
    )
    return Opaque(
        f"tensor of {name}",
        f"only code of {library} can unwrap it; load the checkpoint where {library} is installed and save "
        f"plain tensors ({unwrap})",
        contents=contents,
    )


def _with_attributes(tensor: Any, state: Any, name: str) -> Any:
    """A tensor with the attributes that were set on it: those that hold data are kept, others fall away.

    Attributes that would exchange what the tensor holds make it one that only its own class understands.
    """
    parts = [part for part in (state if isinstance(state, tuple) else (state,)) if part is not None]
    if not parts:
        return tensor
    if not all(isinstance(part, DictNode) and _CONTENT.isdisjoint(part.by_name()) for part in parts):
        return _wrapped(name, (tensor, state))
    pairs = [(str(key)[:200], value) for part in parts for key, value in part.pairs]
    # A glance, because what is not finished yet cannot be searched; `keys` asks again.
    holding = tuple((key, value) for key, value in pairs if glance(value))
    if not holding:
        return tensor
    if not isinstance(tensor, TensorRef):
        return _wrapped(name, (tensor, state))
    return dataclasses.replace(tensor, attributes=holding)


def _with_state(args: tuple[Any, ...]) -> Any:
    return _with_attributes(args[0], args[3], "a Parameter whose saved state replaces its data")


def _narrow_to_bfloat16(array: NdArray) -> None:
    """Make a float32 array the bfloat16 one it was widened from; nothing where that would not be exact."""
    high, low = (0, 2) if array.dtype[0] == ">" else (2, 0)
    data = array.data
    if any(data[low::4]) or any(data[low + 1 :: 4]):
        return
    narrow = bytearray(len(data) // 2)
    narrow[0::2], narrow[1::2] = data[high::4], data[high + 1 :: 4]
    array.dtype, array.data = array.dtype[0] + "bf2", bytes(narrow)


def _to_be_cast(ref: TensorRef, target: DType) -> Opaque:
    return Opaque(
        "device tensor",
        f"it is stored as {ref.dtype.name} and cast to {target.name} on loading; load it and save it again "
        "on the CPU",
        contents=ref,
    )


def _from_cpu_tensor(args: tuple[Any, ...]) -> Any:
    tensor = args[0]
    target = _dtype_argument(args[1])
    if isinstance(tensor, TensorRef) and target != tensor.dtype:
        return _to_be_cast(tensor, target)
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


_TOO_LARGE = 1 << 62


def _ints(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is int and what == "shape":
        return (value,)
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"{what} is no tuple")
    for n in value:
        if type(n) is not int or not 0 <= n < _TOO_LARGE:
            break
    else:
        return tuple(value)
    # Only numbers are shown: an entry may be a graph of 10^9 leaves.
    shown = [n if type(n) is int and abs(n) < 1 << 64 else type(n).__name__ for n in value[:8]]
    raise CorruptArchiveError(f"{what} {shown} has a negative, too large or non-integer entry")
