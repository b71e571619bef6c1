"""A planned output file, as a list of pieces; the value that planning hands to splicing.

Every output is a sequence of literal bytes, source byte ranges and computed streams. A CRC-32 that is
not known when the plan is made (the source stores none, or the bytes change on the way) gets a *slot*:
the splice fills it while the bytes pass, and `Stated` and `Deferred` pieces, which have a known length, are
built from the slots. Pure data: sizes and offsets in bytes.

What a plan has by the hundred thousand is not frozen, as in `values.tensors`. Nothing changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ptbin.values.crc32 import combine_crc32
from ptbin.values.dtypes import DType
from ptbin.values.tensors import ByteRange, Deflated, InMemory, TensorRef, Tiled


@dataclass(slots=True, unsafe_hash=True)
class Slice:
    """`nbytes` from `offset` on of a stored place (deflated ones are inflated on the way)."""

    place: ByteRange | Deflated | InMemory
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Strided:
    """The elements of a strided view, the last index fastest, densely.

    `shape` and `stride` are in elements; `offset` is the first byte inside the place.
    """

    place: ByteRange | Deflated | InMemory
    offset: int
    itemsize: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Assemble:
    """A tensor put together from its tiles, row-major."""

    tiled: Tiled

    @property
    def nbytes(self) -> int:
        return self.tiled.nbytes


@dataclass(frozen=True, slots=True)
class Swap:
    """Another recipe's bytes with the order of every `width` bytes reversed."""

    inner: Slice | Strided
    width: int

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes


@dataclass(frozen=True, slots=True)
class Cast:
    """Another recipe's elements in another type, rounded as torch rounds.

    `what` names the tensor, under which overflows are counted.
    """

    inner: tuple[Recipe, ...]
    source: DType
    target: DType
    what: str

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.inner) // self.source.itemsize * self.target.itemsize


Recipe = Slice | Strided | Assemble | Swap | Cast


def nbytes_of(recipes: tuple[Recipe, ...]) -> int:
    """Bytes of several recipes together."""
    return sum(recipe.nbytes for recipe in recipes)


@dataclass(slots=True, unsafe_hash=True)
class Literal:
    """Bytes that the plan itself holds: headers, the pickle, padding."""

    data: bytes = field(repr=False)

    @property
    def nbytes(self) -> int:
        return len(self.data)


@dataclass(slots=True, unsafe_hash=True)
class Copy:
    """A source range, untouched. Where `crc32` is None, `slot` receives it."""

    offset: int
    nbytes: int
    crc32: int | None = None
    slot: int | None = None
    what: str = "range"


@dataclass(frozen=True, slots=True)
class Computed:
    """Bytes that a recipe produces; `slot` receives their CRC-32."""

    recipe: Recipe
    slot: int
    what: str = "stream"

    @property
    def nbytes(self) -> int:
        return self.recipe.nbytes


@dataclass(frozen=True, slots=True)
class Deferred:
    """Bytes of known length that depend on slots."""

    nbytes: int
    build: Callable[[Mapping[int, int]], bytes]


@dataclass(slots=True, unsafe_hash=True)
class Stated:
    """Bytes of known length that state one checksum; `build` makes them of its value."""

    nbytes: int
    checksum: Checksum
    build: Callable[[int], bytes]


Piece = Literal | Copy | Computed | Deferred | Stated


@dataclass(slots=True, unsafe_hash=True)
class Checksum:
    """A CRC-32 of parts, each (CRC-32, or None and the slot that receives it, bytes)."""

    parts: tuple[tuple[int | None, int | None, int], ...]

    @property
    def is_known(self) -> bool:
        return all(crc is not None for crc, _, _ in self.parts)

    def value(self, crcs: Mapping[int, int]) -> int:
        """The number; `crcs` by slot."""
        if len(self.parts) == 1:
            crc, slot, _ = self.parts[0]
            if crc is None:
                assert slot is not None
                crc = crcs[slot]
            return crc
        total = 0
        for crc, slot, nbytes in self.parts:
            if crc is None:
                assert slot is not None
                crc = crcs[slot]
            total = combine_crc32(total, crc, nbytes)
        return total


@dataclass(slots=True, unsafe_hash=True)
class RecordLayout:
    """Where one storage lies in the output."""

    key: str
    offset: int
    nbytes: int
    checksum: Checksum
    taken_in_part: tuple[ByteRange, ...] = ()
    """Records of the source that do not go into it unchanged; `splice.records` checks their CRC-32s."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole file as pieces, one behind the other: `size` bytes, with the records that lie in it."""

    pieces: tuple[Piece, ...]
    size: int
    records: tuple[RecordLayout, ...]


@dataclass(slots=True, unsafe_hash=True)
class PlannedTensor:
    """One plain tensor of an output.

    Attributes:
        dtype: in the output; differs from the source's where it is cast.
        stride: in elements; None where it is stored contiguously.
        offset: first byte it touches in the file.
        record: key of the `RecordLayout` it lies in.
    """

    name: str
    source: TensorRef
    dtype: DType
    stride: tuple[int, ...] | None
    offset: int
    record: str

    @property
    def nbytes(self) -> int:
        """Bytes of the logical, contiguous tensor."""
        return self.dtype.nbytes_of(self.source.numel)


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One output file: its name next to the others, its pieces, the tensors in it."""

    name: str
    plan: Plan
    tensors: tuple[PlannedTensor, ...]
