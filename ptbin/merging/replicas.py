"""Pieces that several files hold and that must be equal: read once, side by side, before anything is written.

That two pieces are the same one is never concluded from their bytes: a rule or the file itself says so, and
the bytes confirm it. Memory: a chunk for each copy. Costs: every copy is read once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ptbin.errors import IncompleteCheckpointError
from ptbin.merging.tiles import Part, require_plain
from ptbin.values.tensors import ByteRange, InMemory, Joined, TensorRef

CHUNK_NBYTES = 4 << 20


class Readable(Protocol):
    uri: str

    def read(self, offset: int, nbytes: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Replicas:
    """The same piece in several files; the first one is taken.

    Attributes:
        name: of the tensor, as the files have it.
        parts: all of one shape and type.
    """

    name: str
    parts: tuple[Part, ...]


def refuse_unequal(reader: Readable, groups: Iterable[Replicas]) -> int:
    """Compare the copies of each group; bytes read.

    Raises:
        IncompleteCheckpointError: two differ; the message names both files.
        UnsupportedTensorError: a copy that is more than bytes in order.
    """
    total = 0
    for group in groups:
        first, *others = group.parts
        for part in group.parts:
            if not _in_ranges(part.tensor):
                require_plain(part, group.name)
            if (part.tensor.shape, part.tensor.dtype) != (first.tensor.shape, first.tensor.dtype):
                raise IncompleteCheckpointError(
                    f"{reader.uri}: {group.name[:200]!r} is {first.form} in {first.home} and {part.form} "
                    f"in {part.home}, and nothing says how they make a whole"
                )
        digest, nbytes = _digest(reader, first.tensor)
        total += nbytes
        for other in others:
            found, nbytes = _digest(reader, other.tensor)
            total += nbytes
            if found != digest:
                raise IncompleteCheckpointError(
                    f"{reader.uri}: {group.name[:200]!r} should be the same in {first.home} and "
                    f"{other.home}, and differs; the files are not of one save, or each holds a part of it "
                    "that nothing describes"
                )
    return total


def _digest(reader: Readable, tensor: TensorRef) -> tuple[bytes, int]:
    """Of the bytes that the tensor touches, which copies of one stride have in one order."""
    digest = hashlib.sha256(repr(tensor.stride if not tensor.contiguous else None).encode())
    place = tensor.storage.place
    if isinstance(place, Joined):
        for inner in place.parts:
            for piece in _range(reader, inner, 0, inner.nbytes):
                digest.update(piece)
        return digest.digest(), place.nbytes
    assert isinstance(place, (ByteRange, InMemory))
    first, end = tensor.span
    for piece in _range(reader, place, first, end - first):
        digest.update(piece)
    return digest.digest(), end - first


def _in_ranges(tensor: TensorRef) -> bool:
    """Whether it fills ranges that lie one behind the other."""
    place = tensor.storage.place
    plain = tensor.quantizer is None and not tensor.flags and not tensor.attributes
    return isinstance(place, Joined) and plain and tensor.contiguous and tensor.nbytes == place.nbytes


def _range(reader: Readable, place: ByteRange | InMemory, offset: int, nbytes: int) -> Iterator[bytes]:
    if isinstance(place, InMemory):
        yield place.data[offset : offset + nbytes]
        return
    for at in range(0, nbytes, CHUNK_NBYTES):
        yield reader.read(place.offset + offset + at, min(CHUNK_NBYTES, nbytes - at))
