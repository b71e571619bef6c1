"""Views of storages, checked: every stride and offset lies inside the storage, every count is bounded."""

from __future__ import annotations

from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError, UnsupportedTensorError
from ptbin.options import Limits
from ptbin.values.dtypes import DType
from ptbin.values.nodes import MAX_DIMENSIONS, DictNode
from ptbin.values.tensors import TensorRef, TypedStorage

MAX_SIZE = 1 << 62
MAX_KNOWN_SHAPES = 4096


class TensorViews:
    """Makes the tensors of one checkpoint, all against one count.

    Attributes:
        count: tensors made so far.
        unfolded_nbytes: bytes that expanded ones show beyond those that are stored.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.count = 0
        self.unfolded_nbytes = 0
        self._dense: dict[tuple[int, int, int], tuple[tuple[int, ...], tuple[int, ...], DType, int]] = {}
        # Shapes that were checked once, with their bytes, by identity: thousands of tensors share a few.

    def make(
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
        sizes, strides = as_sizes(shape, "shape"), as_sizes(stride, "stride")
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
            self.unfolded_nbytes += max(ref.nbytes - (end - first), 0)
            if self.unfolded_nbytes > self._limits.expanded_nbytes:
                raise LimitExceededError(
                    f"a tensor of shape {list(sizes)} unfolds {end - first} stored bytes to {ref.nbytes}; "
                    f"the limit is {self._limits.expanded_nbytes}",
                    limit="expanded_nbytes",
                )
            if (
                sizes is shape
                and strides is stride
                and element.per_unit == 1
                and end - first == ref.nbytes
                and len(self._dense) < MAX_KNOWN_SHAPES
            ):
                self._dense[id(shape), id(stride), id(element)] = (sizes, strides, element, ref.nbytes)
        return ref

    def _count_tensor(self) -> None:
        self.count += 1
        if self.count > self._limits.tensors:
            raise LimitExceededError(f"more than {self._limits.tensors} tensors", limit="tensors")


def _flags(metadata: Any) -> tuple[str, ...]:
    """Lazy operations on a tensor (torch/_utils.py, `_set_obj_state`: the keys `conj` and `neg`)."""
    if metadata is None:
        return ()
    if not isinstance(metadata, DictNode):
        raise ValueError("tensor metadata")
    return tuple(name for name in ("conj", "neg") if metadata.get(name) is True)


def as_sizes(value: Any, what: str) -> tuple[int, ...]:
    """A shape or a stride as a pickle has it, checked."""
    if type(value) is int and what == "shape":
        return (value,)
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"{what} is not a tuple")
    for n in value:
        if type(n) is not int or not 0 <= n < MAX_SIZE:
            break
    else:
        return tuple(value)
    # Only numbers are shown: an entry may be a graph of 10^9 leaves.
    shown = [n if type(n) is int and abs(n) < 1 << 64 else type(n).__name__ for n in value[:8]]
    raise CorruptArchiveError(f"{what} {shown} has a negative, too large or non-integer entry")
