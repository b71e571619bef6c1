"""Which pieces of a plan the writer moves by itself: runs of neighbouring records, cut to fit its parts.

A plan alternates framing (literals) and data (copies). Where two copies lie in the source exactly as far
apart as the literal between them is long, and the source holds those bytes there, the three are one copy.
The check reads the source's framing, which is foreign: a local header, extra field or descriptor that is
anything but what its directory entry implies does not match and is written anew.

The kernel moves ranges of any length. An object store copies whole parts only, so a run may begin or end
with bytes that go through this process; those are streamed like everything else.

Costs: a small read for each pair of neighbours. On a remote store many are under way at once, and those that
lie close together share a request as long as no more than `SPARE` of the weights comes along with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ptbin.stores import RangeReader, Writer
from ptbin.stores.parts import Extent
from ptbin.stores.ranges import affordable_gap
from ptbin.values.segments import Copy, Literal, Piece

# Framing between two records is a descriptor and a padded header; anything longer is not worth comparing.
MAX_FRAMING_NBYTES = 4096
SPARE = 1 / 512

SMALL_NBYTES = 32 << 10
"""Below this a copy through memory takes less time than a call to the kernel for it."""
LOCAL_GAP_NBYTES = 4096
"""So much is read of a local file more rather than calling for each of two pieces."""


@dataclass(frozen=True, slots=True)
class Move:
    """A source range that `Writer.copy_from` takes in one call."""

    offset: int
    nbytes: int


def with_moves(pieces: Sequence[Piece], reader: RangeReader, writer: Writer) -> list[Piece | Move]:
    """The same bytes; what the writer can take from the source by itself is a `Move`."""
    if not writer.moves_from(reader) or not any(_has_no_slot(piece) for piece in pieces):
        return list(pieces)
    whole = coalesce(pieces, reader)
    parts = writer.lay_out([Extent(piece.nbytes, _is_movable(piece)) for piece in whole])
    copied = [(part.start, part.start + part.nbytes) for part in parts if part.copied]
    if not copied:
        return list(pieces)  # by records, so that each is checked as it passes
    return list(_cut(whole, iter(copied)))


def _has_no_slot(piece: Piece) -> bool:
    # What has one is read in any case: its CRC-32 is not known before.
    return type(piece) is Copy and piece.slot is None


def _is_movable(piece: Piece) -> bool:
    if not isinstance(piece, Copy) or piece.slot is not None or not piece.nbytes:
        return False
    # A small record by itself is read with its neighbours (`runs`).
    return piece.nbytes >= SMALL_NBYTES or piece.crc32 is None


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


def coalesce(pieces: Iterable[Piece], reader: RangeReader) -> list[Piece]:
    """The same bytes in fewer pieces."""
    pieces = list(pieces)
    between = _candidates(pieces)
    spare = int(SPARE * sum(piece.nbytes for piece in pieces if isinstance(piece, Copy)))
    whole = _confirmed(between, reader, spare)
    merged: list[Piece] = []
    for index, piece in enumerate(pieces):
        if index - 1 in whole:
            assert isinstance(piece, Copy)
            before = merged[-2]
            assert isinstance(before, Copy)
            merged[-2:] = [
                Copy(
                    before.offset, piece.offset + piece.nbytes - before.offset, what=f"run from {before.what}"
                )
            ]
        else:
            merged.append(piece)
    return merged


def _candidates(pieces: list[Piece]) -> dict[int, tuple[int, bytes]]:
    """By index of a literal: where in the source its bytes would have to be, and the bytes."""
    found: dict[int, tuple[int, bytes]] = {}
    for index in range(1, len(pieces) - 1):
        before, literal, after = pieces[index - 1 : index + 2]
        if (
            isinstance(literal, Literal)
            and isinstance(before, Copy)
            and isinstance(after, Copy)
            and before.slot is None
            and after.slot is None
            and before.offset + before.nbytes + literal.nbytes == after.offset
            and literal.nbytes <= MAX_FRAMING_NBYTES
        ):
            found[index] = (before.offset + before.nbytes, literal.data)
    return found


def _confirmed(between: dict[int, tuple[int, bytes]], reader: RangeReader, spare_nbytes: int) -> set[int]:
    """Those whose bytes the source does hold; up to `spare_nbytes` more may be read to save requests."""
    indices = list(between)
    ranges = [(between[index][0], len(between[index][1])) for index in indices]
    gap = LOCAL_GAP_NBYTES
    if not reader.is_local:
        gap = affordable_gap(ranges, most=reader.gap_nbytes, budget_nbytes=spare_nbytes)
    read: dict[int, bytes] = {}
    for number, data in reader.iter_ranges(ranges, gap_nbytes=gap):
        read[number] = read.get(number, b"") + data
    return {index for number, index in enumerate(indices) if read.get(number, b"") == between[index][1]}
