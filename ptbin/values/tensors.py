"""Where weights lie, as values: the one language that reading, writing and proving share.

A `TensorRef` says how elements are laid out in a `Storage`; a `Storage` says where its bytes are.
Nothing here opens anything. Offsets and sizes are bytes unless the name says elements. The offsets of a
source of several files count in one address space (`stores.joined`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

from ptbin.values.dtypes import DType

# Values that indexes are made of by the hundred thousand are not frozen: making one would take four times
# as long. Nothing changes them.


@dataclass(slots=True, unsafe_hash=True)
class ByteRange:
    """`nbytes` bytes of the source from `offset` on, as they are; both exact.

    Attributes:
        crc32: CRC-32 that the container states for exactly these bytes, or None where it states none.
        record_offset: where the zip local header of this record begins; None outside zip archives.
        member: name of the zip member, for messages.
        closed: the directory alone fixes where the data lie (see `reading.zip_directory`).
        record: what these bytes are a part of, where the container states a CRC-32 of all of that.
    """

    offset: int
    nbytes: int
    crc32: int | None = None
    record_offset: int | None = None
    member: str | None = None
    closed: bool = False
    record: ByteRange | None = None


@dataclass(frozen=True, slots=True)
class Deflated:
    """A deflated zip member: `compressed_nbytes` at `offset` that inflate to `nbytes`."""

    offset: int
    compressed_nbytes: int
    nbytes: int
    crc32: int | None
    member: str


class _DistinctBytes(bytes):
    __slots__ = ()


def distinct_bytes(data: bytes | bytearray) -> bytes:
    """Bytes as a distinct object, by whose identity they are counted: Python shares all single bytes."""
    return _DistinctBytes(data) if len(data) == 1 else bytes(data)


@dataclass(frozen=True, slots=True)
class InMemory:
    """Bytes that the pickle itself carried (numpy arrays, nested `torch.save`)."""

    data: bytes = field(repr=False)

    @property
    def nbytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Joined:
    """Several ranges, one behind the other: shards along the first dimension, ZeRO's flat partitions."""

    parts: tuple[ByteRange | InMemory, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Tile:
    """One box of a tensor that lies in pieces.

    Attributes:
        start: where in the whole tensor the box begins, in elements, one number per dimension.
        shape: its extent, in elements.
        place: the storage that the box was saved with.
        offset: first byte of the box inside `place`.
        stride: how the box lies in `place`, in elements; a dense row-major box has `dense_strides(shape)`.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    place: ByteRange | InMemory
    offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tiled:
    """A dense row-major tensor of `shape` that boxes fill without overlap or gap; its maker checks that."""

    shape: tuple[int, ...]
    itemsize: int
    tiles: tuple[Tile, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def part_of(place: ByteRange | InMemory, offset: int, nbytes: int) -> ByteRange | InMemory:
    """Part of a place, which has neither CRC-32 nor framing for itself."""
    if offset == 0 and nbytes == place.nbytes:
        return place
    if isinstance(place, InMemory):
        return InMemory(place.data[offset : offset + nbytes])
    record = place.record if place.crc32 is None else place
    return ByteRange(place.offset + offset, nbytes, member=place.member, record=record)


Place = ByteRange | Deflated | InMemory | Joined | Tiled


@dataclass(eq=False, slots=True)
class Storage:
    """A run of bytes that tensors view. Identity is meaning: two tensors tied share one `Storage`.

    Attributes:
        key: name inside the container (`data/<key>`).
        nbytes: size that the pickle states.
        place: where the bytes are; None until the container's index has been read to the end.
        big_endian: the bytes are in the other order and must be swapped by the element's width.
    """

    key: str
    nbytes: int
    place: Place | None = None
    big_endian: bool = False


class TypedStorage:
    """A storage seen through an element type, as persistent ids deliver it."""

    __slots__ = ("dtype", "storage", "view_offset")

    def __init__(self, storage: Storage, dtype: DType, view_offset: int = 0) -> None:
        self.storage = storage
        self.dtype = dtype
        self.view_offset = view_offset


@dataclass(eq=False, slots=True)
class TensorRef:
    """A strided view: shape and stride in elements, `storage_offset` in elements.

    Attributes:
        quantizer: arguments of `torch._utils._rebuild_qtensor` (scheme name, scale or scales, zero
            point or points, axis), tensors among them as `TensorRef`; None for plain tensors.
        flags: `conj` and `neg`, the lazy operations torch records next to the bytes instead of doing them.
        attributes: Python attributes of the tensor that hold data themselves (bitsandbytes' `SCB`).
    """

    storage: Storage
    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int = 0
    quantizer: tuple[Any, ...] | None = None
    flags: tuple[str, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the logical, contiguous tensor."""
        return self.dtype.nbytes_of(self.numel)

    @property
    def span(self) -> tuple[int, int]:
        """First byte and end of the part of the storage that the view touches."""
        extent = extent_of(self.shape, self.stride)
        if not extent:
            return (0, 0)
        first = self.storage_offset // self.dtype.per_unit * self.dtype.itemsize
        return (first, self.dtype.nbytes_of(self.storage_offset + extent))

    @property
    def contiguous(self) -> bool:
        return is_contiguous(self.shape, self.stride)

    @property
    def dense(self) -> bool:
        """Every byte of the span is viewed, broadcast (stride 0) dimensions aside."""
        if self.numel == 0:
            return True
        expected = 1
        for s, n in sorted((s, n) for n, s in zip(self.shape, self.stride, strict=True) if n != 1 and s != 0):
            if s != expected:
                return False
            expected *= n
        return True

    @property
    def overlapping(self) -> bool:
        """Some byte is viewed by more than one index, broadcast dimensions aside (`Tensor.unfold`)."""
        span = 1
        for s, n in sorted((s, n) for n, s in zip(self.shape, self.stride, strict=True) if n > 1 and s != 0):
            if s < span:
                return True
            span += s * (n - 1)
        return False

    def layout_key(self) -> tuple[Any, ...]:
        """Equal for views that show the same elements in the same order."""
        return (id(self.storage), self.dtype.name, self.shape, self.stride, self.storage_offset)


@dataclass(frozen=True, eq=False, slots=True)
class SparseTensor:
    """A sparse tensor, kept in parts.

    Attributes:
        layout: `torch.sparse_coo`, `torch.sparse_csr`, ...
        parts: (part name, tensor): indices and values, in the order `_rebuild_sparse_tensor` takes them.
        shape: logical shape, elements.
        coalesced: COO only; None where the file does not say.
    """

    layout: str
    parts: tuple[tuple[str, TensorRef], ...]
    shape: tuple[int, ...]
    coalesced: bool | None = None


@functools.lru_cache(4096)
def extent_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first one of a view to the last one, both included; 0 of an empty view."""
    extent = 1
    for n, s in zip(shape, stride, strict=True):
        if n == 0:
            return 0
        extent += (n - 1) * s
    return extent


def is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements lie one behind the other, the last index fastest."""
    expected = 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and s != expected:
            return 0 in shape
        expected *= n
    return True


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor of this shape."""
    strides = []
    step = 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
