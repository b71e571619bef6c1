"""Which requests to make for a list of byte ranges: pure planning, no I/O.

A request over the network costs about as much as some hundred kilobytes, so near neighbours share one;
a request is also the unit of memory, so none is longer than a chunk. Costs O(1) memory: fetches are
planned as they are consumed, also for a range of many gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` (inclusive) to `stop` (exclusive) of a fetched block belong to range `index`."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """One request: `nbytes` bytes from `offset`, and what of them goes where."""

    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]


def plan_fetches(
    ranges: Iterable[tuple[int, int]], *, chunk_nbytes: int, gap_nbytes: int = 0
) -> Iterator[Fetch]:
    """Requests of at most `chunk_nbytes` that cover `ranges` of (offset, nbytes) in their order.

    A range joins the request before it where it begins at or after that one's end and at most
    `gap_nbytes` later; the gap is then fetched and dropped. A gap is never fetched at a chunk's end,
    where it would buy nothing. Ranges that go back or overlap begin a request of their own.
    """
    if chunk_nbytes < 1 or gap_nbytes < 0:
        raise ValueError(f"chunk of {chunk_nbytes} bytes with gaps of {gap_nbytes}: no request fits that")
    begin = end = 0
    pieces: list[Piece] = []
    for index, (offset, nbytes) in enumerate(ranges):
        position, stop = offset, offset + nbytes
        while position < stop:
            joins = pieces and 0 <= position - end <= gap_nbytes and position - begin < chunk_nbytes
            if not joins:
                if pieces:
                    yield Fetch(begin, end - begin, tuple(pieces))
                begin, pieces = position, []
            taken = min(stop, begin + chunk_nbytes) - position
            pieces.append(Piece(index, position - begin, position - begin + taken))
            position += taken
            end = position
    if pieces:
        yield Fetch(begin, end - begin, tuple(pieces))


def affordable_gap(ranges: Sequence[tuple[int, int]], *, most: int, budget_nbytes: int) -> int:
    """The widest gap up to `most` such that fetching all gaps not wider costs `budget_nbytes` at most."""
    gaps = sorted(
        after - (offset + nbytes)
        for (offset, nbytes), (after, _) in pairwise(ranges)
        if 0 <= after - (offset + nbytes) <= most
    )
    widest = 0
    for gap in gaps:
        budget_nbytes -= gap
        if budget_nbytes < 0:
            # Others may be as wide as the last one that was paid for.
            return min(widest, gap - 1) if gap else 0
        widest = gap
    return widest
