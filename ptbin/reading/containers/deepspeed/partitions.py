"""DeepSpeed's flat partitions: vectors without names, from which parameters are cut. Pure."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError, UnsupportedTensorError
from ptbin.options import Limits
from ptbin.values.dtypes import BY_NAME, DType
from ptbin.values.tensors import (
    ByteRange,
    InMemory,
    Joined,
    Place,
    Storage,
    TensorRef,
    dense_strides,
    part_of,
)

FLOATING = ("float", "bfloat")


@dataclass(slots=True)
class Vector:
    """Flat tensors, one behind the other, as one vector; offsets are elements."""

    uri: str
    dtype: DType | None = None
    pieces: list[ByteRange | InMemory] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def type_name(self) -> str:
        return "no type" if self.dtype is None else self.dtype.name

    def append(self, flat: TensorRef, what: str) -> None:
        """Raises UnsupportedTensorError: the tensor is not a run of plain bytes, or of another type."""
        if self.dtype is None:
            self.dtype = flat.dtype
        if flat.dtype != self.dtype:
            raise UnsupportedTensorError(
                f"{self.uri}: {what} is {flat.dtype.name}, the partition before it {self.dtype.name}"
            )
        if flat.numel:
            self.pieces.append(_bytes_of(flat, f"{self.uri}: {what}"))
            self.ends.append(self.numel + flat.numel)

    def cut(self, start: int, numel: int) -> Iterator[ByteRange | InMemory]:
        """The elements from `start` on, which must be there, as ranges."""
        assert self.dtype is not None
        width = self.dtype.itemsize
        index = bisect.bisect_right(self.ends, start)
        while numel > 0:
            begin = self.ends[index - 1] if index else 0
            taken = min(numel, self.ends[index] - start)
            yield part_of(self.pieces[index], (start - begin) * width, taken * width)
            start, numel, index = start + taken, numel - taken, index + 1


def _bytes_of(flat: TensorRef, what: str) -> ByteRange | InMemory:
    """Where the elements of a one-dimensional tensor lie."""
    place = flat.storage.place
    if len(flat.shape) != 1 or not flat.contiguous or flat.quantizer is not None or flat.flags:
        raise UnsupportedTensorError(f"{what}: shape {list(flat.shape)}, expected one contiguous dimension")
    if not flat.dtype.name.startswith(FLOATING):
        raise UnsupportedTensorError(f"{what}: {flat.dtype.name}, expected floating numbers")
    if flat.storage.big_endian:
        raise UnsupportedTensorError(f"{what}: stored big-endian")
    if not isinstance(place, (ByteRange, InMemory)):
        raise UnsupportedTensorError(f"{what}: stored compressed; unpack and pack the file uncompressed")
    return part_of(place, flat.storage_offset * flat.dtype.itemsize, flat.nbytes)


def refuse_overlap(uri: str, tensors: Iterable[TensorRef]) -> None:
    """No byte may serve two tensors: a small file would unfold to any size."""
    spans = sorted((id(t.storage), *t.span) for t in tensors if t.numel)
    for (storage, _, end), (following, start, _) in itertools.pairwise(spans):
        if storage == following and start < end:
            raise CorruptArchiveError(f"{uri}: two partitions lie on the same bytes of one storage")


class Cutter:
    """Makes tensors of parts of vectors; counts the pieces that all of them have."""

    def __init__(self, uri: str, limits: Limits) -> None:
        self.uri = uri
        self.limits = limits
        self.pieces = 0

    def tensor(
        self, key: str, shape: tuple[int, ...], dtype: DType | None, parts: Iterable[ByteRange | InMemory]
    ) -> TensorRef:
        """The tensor that fills a new storage over the parts.

        Raises:
            LimitExceededError: more pieces than tensors are allowed.
        """
        pieces = tuple(parts)
        self.pieces += len(pieces) + 1
        if self.pieces > self.limits.tensors:
            raise LimitExceededError(
                f"{self.uri}: more than {self.limits.tensors} pieces of tensors", limit="tensors"
            )
        place: Place = InMemory(b"")
        if pieces:
            place = pieces[0] if len(pieces) == 1 else Joined(pieces)
        dtype = dtype or BY_NAME["float32"]
        storage = Storage(key, math.prod(shape) * dtype.itemsize, place)
        assert place.nbytes == storage.nbytes
        return TensorRef(storage, dtype, shape, dense_strides(shape))

    def shared_out(self, key: str, shape: tuple[int, ...], shares: Sequence[tuple[Vector, int]]) -> TensorRef:
        """A tensor of which each rank holds ceil(numel / ranks) elements from an offset of its vector on."""
        numel = math.prod(shape)
        share = -(-numel // len(shares))
        parts = (
            part
            for rank, (vector, offset) in enumerate(shares)
            for part in vector.cut(offset, max(min(share, numel - rank * share), 0))
        )
        return self.tensor(key, shape, shares[0][0].dtype, parts)


def short(value: Any) -> str:
    """A value of the file in a message; records have no contents there."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge number"
    if isinstance(value, (str, int, float, type(None))):
        return repr(value)[:100]
    if isinstance(value, (list, tuple)) and len(value) < 8 and all(type(n) is int for n in value):
        return f"[{', '.join(short(n) for n in value)}]"
    return f"a {type(value).__name__}"
