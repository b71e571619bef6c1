"""Byte streams that are computed on the way: inflated, packed, put in order, assembled, swapped, cast.

Bounded memory: a few MiB whatever the tensor's size. Each stream reads its source forward only.
"""

from __future__ import annotations

import array
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ptbin.splice.assembly import iter_assembled
from ptbin.splice.strided import iter_in_order
from ptbin.stores import RangeReader
from ptbin.stores.inflate import iter_inflated
from ptbin.values.segments import Assemble, Cast, Recipe, Strided, Swap
from ptbin.values.tensors import ByteRange, Deflated, InMemory

if TYPE_CHECKING:
    from ptbin.splice.casting import CastTally

CHUNK_NBYTES = 4 << 20

_SWAP_CODES = {2: "H", 4: "I", 8: "Q"}


def iter_recipe(recipe: Recipe, reader: RangeReader, overflows: dict[str, CastTally]) -> Iterator[bytes]:
    """The bytes of a recipe, in pieces.

    Args:
        reader: of the source; `RecordChecks.watch` gives one that confirms CRC-32s.
        overflows: casts count here what became infinite, by the recipe's `what`.

    Raises:
        ChecksumMismatchError, CorruptArchiveError: the source is damaged.
    """
    if isinstance(recipe, Cast):
        from ptbin.splice.casting import CastTally, iter_cast

        inner = (iter_recipe(part, reader, overflows) for part in recipe.inner)
        tally = overflows.setdefault(recipe.what, CastTally())
        return iter_cast(itertools.chain.from_iterable(inner), recipe.source, recipe.target, tally)
    if isinstance(recipe, Swap):
        return _swapped(iter_recipe(recipe.inner, reader, overflows), recipe.width)
    if isinstance(recipe, Assemble):
        return iter_assembled(recipe.tiled, reader)
    if isinstance(recipe, Strided):
        return _in_order(recipe, reader)
    place = recipe.place
    if isinstance(place, InMemory):
        return iter((place.data[recipe.offset : recipe.offset + recipe.nbytes],))
    if isinstance(place, Deflated):
        return iter_inflated(place, reader, recipe.offset, recipe.nbytes)
    return reader.iter_range(place.offset + recipe.offset, recipe.nbytes, chunk_nbytes=CHUNK_NBYTES)


def _in_order(recipe: Strided, reader: RangeReader) -> Iterator[bytes]:
    place = recipe.place
    if isinstance(place, ByteRange):
        base = place.offset

        def read(offset: int, nbytes: int) -> bytes:
            return reader.read(base + offset, nbytes)
    else:
        # A deflated storage has no random access: it is inflated once, within `Limits.expanded_nbytes`.
        data = place.data if isinstance(place, InMemory) else b"".join(iter_inflated(place, reader))

        def read(offset: int, nbytes: int) -> bytes:
            return data[offset : offset + nbytes]

    return iter_in_order(read, recipe.offset, recipe.shape, recipe.stride, recipe.itemsize)


def _swapped(stream: Iterator[bytes], width: int) -> Iterator[bytes]:
    rest = b""
    for piece in stream:
        data = rest + piece if rest else piece
        whole = len(data) // width * width
        values = array.array(_SWAP_CODES[width], data[:whole])
        values.byteswap()
        rest = data[whole:]
        if whole:
            yield values.tobytes()
