"""Which pieces of a plan the writer moves by itself, cut where its parts begin and end.

The kernel moves ranges of any length. An object store copies whole parts only, so a run may begin or end
with bytes that go through this process; those are streamed like everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ptbin.splice.coalesce import coalesce
from ptbin.stores import RangeReader, Writer
from ptbin.stores.parts import Extent
from ptbin.values.segments import Copy, Piece

__all__ = ["Move", "with_moves"]


@dataclass(frozen=True, slots=True)
class Move:
    """A source range that `Writer.copy_from` takes in one call."""

    offset: int
    nbytes: int


def with_moves(pieces: Sequence[Piece], reader: RangeReader, writer: Writer) -> list[Piece | Move]:
    """The same bytes; what the writer can take from the source by itself is a `Move`."""
    if not writer.moves_from(reader):
        return list(pieces)
    whole = coalesce(pieces, reader)
    parts = writer.lay_out([Extent(piece.nbytes, _is_movable(piece)) for piece in whole])
    copied = [(part.start, part.start + part.nbytes) for part in parts if part.copied]
    if not copied:
        return list(pieces)  # by records, so that each is checked as it passes
    return list(_cut(whole, iter(copied)))


def _is_movable(piece: Piece) -> bool:
    # What has a slot is read in any case: its CRC-32 is not known before.
    return isinstance(piece, Copy) and piece.slot is None and piece.nbytes > 0


def _cut(pieces: Sequence[Piece], copied: Iterator[tuple[int, int]]) -> Iterator[Piece | Move]:
    """`copied`: ascending ranges of the output, each within one movable piece."""
    start, end = next(copied, (None, None))
    position = 0
    for piece in pieces:
        after = position + piece.nbytes
        if start is None or start >= after or not isinstance(piece, Copy):
            yield piece
            position = after
            continue
        shift = piece.offset - position
        while start is not None and end is not None and start < after:
            if position < start:
                yield Copy(position + shift, start - position, what=piece.what)
            yield Move(start + shift, end - start)
            position = end
            start, end = next(copied, (None, None))
        if position < after:
            yield Copy(position + shift, after - position, what=piece.what)
            position = after
