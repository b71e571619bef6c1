"""Runs stay whole: neighbouring records, framing included, as one range of the source.

A plan alternates framing (literals) and data (copies). Where two copies lie in the source exactly as
far apart as the literal between them is long, and the source holds those very bytes there, the three
are one copy. The check reads the source's framing, which is foreign: a local header, extra field or
descriptor that is anything but what its directory entry implies does not match and is written anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ptbin.segments import Copy, Literal, Piece

if TYPE_CHECKING:
    from ptbin.stores import RangeReader

__all__ = ["coalesce"]

# Framing between two records is a descriptor and a padded header; anything longer is not worth comparing.
MAX_FRAMING_NBYTES = 4096


def coalesce(pieces: Iterable[Piece], reader: RangeReader) -> list[Piece]:
    """The same bytes in fewer pieces. Costs one small read for each pair of neighbours."""
    merged: list[Piece] = []
    for piece in pieces:
        if (
            isinstance(piece, Copy)
            and len(merged) >= 2
            and isinstance(between := merged[-1], Literal)
            and isinstance(before := merged[-2], Copy)
            and before.slot is None
            and piece.slot is None
            and before.offset + before.nbytes + between.nbytes == piece.offset
            and between.nbytes <= MAX_FRAMING_NBYTES
            and reader.read(before.offset + before.nbytes, between.nbytes) == between.data
        ):
            merged[-2:] = [
                Copy(
                    before.offset, piece.offset + piece.nbytes - before.offset, what=f"run from {before.what}"
                )
            ]
        else:
            merged.append(piece)
    return merged
