"""What torch's pickles mean: the constructors that stand between a storage and a tensor.

Turns `torch._utils._rebuild_*` calls into `TensorRef`s, checked by `tensor_views`. Sources: torch/_utils.py,
torch/_tensor.py (`_reduce_ex_internal`), torch/storage.py, torch/serialization.py, 2.13; `_rebuild_tensor`
(v1) and `_rebuild_xla_tensor` are of older releases.

Knows no container: a storage arrives through `persistent` or `load_nested`, both given by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ptbin.options import Limits
from ptbin.reading.pickle.meshes import Grids
from ptbin.reading.pickle.numpy_objects import array_storage, iter_numpy_reducers, narrow_to_bfloat16
from ptbin.reading.pickle.old_tensors import OldTensors
from ptbin.reading.pickle.plain_objects import PlainObjects
from ptbin.reading.pickle.tensor_views import TensorViews, as_sizes
from ptbin.reading.pickle.wrappers import placement_of, read_wrapper, with_attributes, wrapped_tensor
from ptbin.values.dtypes import QUANTIZER_SCHEMES, DType, dtype_by_name
from ptbin.values.nodes import Global, NdArray, Opaque, TorchSize
from ptbin.values.tensors import InMemory, SparseTensor, Storage, TensorRef, TypedStorage

Reduce = Callable[[tuple[Any, ...]], Any]

_SPARSE_PARTS = {
    "torch.sparse_coo": ("indices", "values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}

# Packages for other devices whose tensors are pickled as torch's own, arguments in the same order, by a
# function of theirs: (storage, offset, size, stride, requires_grad, hooks, what the device wants to know).
# torch_npu's is torch_npu/utils/storage.py, `_rebuild_npu_tensor`; tensors in a private layout it
# saves as plain ones.
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


class TorchVocabulary:
    """The reducer table for one checkpoint."""

    def __init__(self, limits: Limits, load_nested: Callable[[bytes], Any]) -> None:
        self.limits = limits
        self._load_nested = load_nested
        self._views = TensorViews(limits)
        self.tensor = self._views.make
        self._plain = PlainObjects(limits)
        self._arrays: list[NdArray] = []
        self._nested: list[bytes] = []
        self.placements: list[Any] = []
        """Of distributed tensors that were read as their local ones: meshes and placements, else lost."""
        self.grids = Grids()
        self._table: Mapping[tuple[str, str], Reduce] | None = None
        self._old = OldTensors(
            lambda storage, *layout: self.tensor(storage, None, *layout),
            self._plain.charge,
            self._nested.append,
        )

    def blobs(self) -> Iterator[bytes | bytearray]:
        """Every run of bytes that pickles carried inside: numpy arrays, storages of nested files."""
        yield from self._nested
        for array in self._arrays:
            if array.data and not array.scalar:
                yield array.data

    def mark(self) -> tuple[int, int, int, int, int]:
        """Where the counts stand, for `rewind` after a run that broke off and will be made anew."""
        counts = (self._views.count, self._plain.copied_nbytes, self._views.unfolded_nbytes)
        return (*counts, len(self._arrays), len(self._nested))

    def rewind(self, mark: tuple[int, int, int, int, int]) -> None:
        """Forget what was built since `mark`."""
        self._views.count, self._plain.copied_nbytes, self._views.unfolded_nbytes, arrays, nested = mark
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
        table.update(self._plain.iter_reducers())
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
        table["torch.storage", "_load_from_bytes"] = lambda args: self._load_nested(
            self._plain.bytes_of(args[0])
        )
        table["torch.serialization", "_get_layout"] = lambda args: Global("torch.layout", args[0])
        table["torch", "Size"] = lambda args: TorchSize(as_sizes(args[0], "size"))
        return _Reducers(table, self._vendor_tensor)

    def set_state(self, target: Any, state: Any) -> bool:
        """What BUILD does to a finished tensor (`OldTensors.set_state`)."""
        return self._old.set_state(target, state)

    # -- tensors -----------------------------------------------------------------------------

    def _tensor_v1(self, args: tuple[Any, ...]) -> TensorRef:
        # v2 adds requires_grad, hooks, and lately a mapping of lazy operations
        storage, offset, shape, stride = args[:4]
        return self.tensor(storage, None, offset, shape, stride, metadata=args[6] if len(args) > 6 else None)

    def _vendor_tensor(self, args: tuple[Any, ...]) -> Any:
        if len(args) >= 4 and isinstance(args[0], TypedStorage):
            return self.tensor(args[0], None, *args[1:4])
        return wrapped_tensor("a device's own kind", args)

    def _tensor_v3(self, args: tuple[Any, ...]) -> TensorRef:
        storage, offset, shape, stride = args[:4]
        metadata = args[7] if len(args) > 7 else None
        return self.tensor(storage, _dtype_argument(args[6]), offset, shape, stride, metadata=metadata)

    def _qtensor(self, args: tuple[Any, ...]) -> TensorRef:
        storage, offset, shape, stride, params = args[:5]
        if not isinstance(params, tuple) or not params or not isinstance(params[0], Global):
            raise ValueError("quantizer parameters")
        scheme, values = params[0].name, params[1:]
        kinds = (float, int) if scheme.startswith("per_tensor") else (TensorRef, TensorRef, int)
        plain = all(not isinstance(v, TensorRef) or v.quantizer is None for v in values)
        known = params[0].module == "torch" and scheme in QUANTIZER_SCHEMES
        if not known or tuple(map(type, values)) != kinds or not plain:
            raise ValueError("quantizer parameters")
        return self.tensor(storage, None, offset, shape, stride, (scheme, *values))

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
        shape = as_sizes(data[len(names)], "shape")
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
            narrow_to_bfloat16(array)
        ref = self.array_as_tensor(array)
        if target is not None and target != ref.dtype:
            return _to_be_cast(ref, target)
        return ref

    def array_as_tensor(self, array: NdArray) -> TensorRef:
        """A numpy array as a tensor over bytes in memory.

        Raises:
            ValueError: an element type that torch does not have.
        """
        storage, stride = array_storage(array)
        return self.tensor(storage, None, 0, array.shape, stride)

    def _unwrapped(self, name: str, contents: Any, args: tuple[Any, ...], state: Any) -> Any:
        """A distributed tensor as `wrappers` reads it, any other wrapper as what cannot be taken."""
        found = read_wrapper(args, state, self.grids)
        if isinstance(found, TensorRef):
            self.placements.append(placement_of(state))
        return wrapped_tensor(name, contents) if found is None else found

    def _from_type(self, args: tuple[Any, ...]) -> Any:
        # (function, type, arguments, state): the subclass falls away, the data stay
        function, kind, inner = args[0], args[1], args[2]
        state = args[3] if len(args) > 3 else None
        name = kind.path if isinstance(kind, Global) else "a subclass"
        reducer = (
            self.reducers().get((function.module, function.name)) if isinstance(function, Global) else None
        )
        if reducer is None or not isinstance(inner, tuple):
            return wrapped_tensor(name, args)
        if isinstance(function, Global) and function.name == "_rebuild_wrapper_subclass":
            return self._unwrapped(name, args, inner, state)
        return with_attributes(reducer(inner), state, name)


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


def _dtype_argument(value: Any) -> DType:
    dtype = dtype_by_name(value.name) if isinstance(value, Global) and value.module == "torch" else None
    if dtype is None:
        raise ValueError("an element type that torch does not have")
    return dtype


def _with_state(args: tuple[Any, ...]) -> Any:
    return with_attributes(args[0], args[3], "a Parameter whose saved state replaces its data")
