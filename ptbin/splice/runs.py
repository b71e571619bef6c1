"""Runs of pieces that are too small to be moved one by one: one read and one write for all of a run.

A checkpoint of many small tensors is some framing and a few bytes, over and over. Taken one by one each piece
costs a read and a write, and Python's steps around them a hundred times what its bytes do.

Costs: memory of `RUN_NBYTES` twice. What lies between two records of the source, up to `GAP_NBYTES`, is read
and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ptbin.splice.moves import SMALL_NBYTES, Move
from ptbin.splice.records import RecordChecks
from ptbin.stores import RangeReader
from ptbin.values.crc32 import confirm_crc32, crc32_of
from ptbin.values.segments import Copy, Literal, Piece, Stated

RUN_NBYTES = 1 << 20
GAP_NBYTES = 4096


def is_small(piece: Piece | Move) -> bool:
    """Whether a piece may be in a run."""
    kind = type(piece)
    return kind is Stated or ((kind is Copy or kind is Literal) and piece.nbytes < SMALL_NBYTES)


def iter_runs(pieces: Sequence[Piece | Move], reader: RangeReader) -> Iterator[tuple[int, int]]:
    """First and end of each run of small pieces, by their numbers; any other piece is one by itself.

    The copies of a run lie behind one another in the source. A remote one is streamed in one pass instead.
    """
    first = 0
    if not reader.is_local:
        yield from ((index, index + 1) for index in range(len(pieces)))
        return
    while first < len(pieces):
        end, nbytes = first, 0
        position: int | None = None
        while end < len(pieces) and nbytes < RUN_NBYTES and is_small(piece := pieces[end]):
            if type(piece) is Copy:
                if position is not None and not 0 <= piece.offset - position <= GAP_NBYTES:
                    break
                position = piece.offset + piece.nbytes
            nbytes += piece.nbytes
            end += 1
        end = max(end, first + 1)
        yield first, end
        first = end


def read_run(
    run: Sequence[Piece | Move], reader: RangeReader, crcs: dict[int, int], checks: RecordChecks
) -> bytes:
    """The bytes of a run of small pieces; `crcs` gets the CRC-32s by slot.

    Raises:
        ChecksumMismatchError: a record of the source is not what its container states.
    """
    copies = [piece for piece in run if type(piece) is Copy]
    start = copies[0].offset if copies else 0
    nbytes = copies[-1].offset + copies[-1].nbytes - start if copies else 0
    block = memoryview(reader.read(start, nbytes))
    counts = checks.counts
    parts: list[bytes | memoryview] = []
    for piece in run:
        if type(piece) is Literal:
            parts.append(piece.data)
        elif type(piece) is Copy:
            data = block[piece.offset - start : piece.offset - start + piece.nbytes]
            crc = crc32_of(data)
            if crc != piece.crc32:
                confirm_crc32(reader.uri, piece.what, crc, piece.crc32)
            if counts:
                checks.count_run(reader.uri, piece.offset, piece.nbytes, crc)
            if piece.slot is not None:
                crcs[piece.slot] = crc
            parts.append(data)
        else:
            assert type(piece) is Stated
            parts.append(piece.build(piece.checksum.value(crcs)))
    return b"".join(parts)
