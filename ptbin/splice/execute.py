"""Carry a plan out.

Between two local files the kernel moves whole runs of records (`copy_file_range`), inside one object store
the store does (`UploadPartCopy`), and no weight passes through this process on its way. Everywhere else the
source ranges are streamed in order, a few MiB at a time; there the CRC-32s that the source states are
checked as the bytes pass. In all cases the result states the CRC-32 that the whole output must have,
combined from those of its parts.

Promises: the writer receives exactly the plan's bytes or an error is raised; commits nothing itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptbin.splice.moves import Move, with_moves
from ptbin.splice.parallel_pieces import ParallelPieces
from ptbin.splice.recipes import iter_recipe
from ptbin.splice.records import RecordChecks
from ptbin.splice.runs import iter_runs, read_run
from ptbin.stores import RangeReader, Writer
from ptbin.values.crc32 import combine_crc32, confirm_crc32, crc32_of, crc32_of_all
from ptbin.values.segments import Computed, Copy, Deferred, Literal, Piece, Plan, Stated
from ptbin.values.tensors import ByteRange

if TYPE_CHECKING:
    from ptbin.splice.casting import CastTally

STREAM_CHUNK_NBYTES = 8 << 20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class SpliceResult:
    """What the output must be.

    Attributes:
        crcs: CRC-32 by slot.
        crc32: CRC-32 of the whole output.
        moved: bytes that never entered this process on their way: the kernel or the store moved them.
        overflowed: by record key, elements that a cast made infinite.
        confirmed: records taken in part that are what their container states (`RecordChecks`).
    """

    crcs: dict[int, int]
    crc32: int
    moved: int
    overflowed: dict[str, int]
    confirmed: set[ByteRange]


def splice(
    plan: Plan,
    reader: RangeReader,
    writer: Writer,
    progress: Progress | None = None,
    *,
    checks: RecordChecks | None = None,
    check_source: bool = True,
    check_moved: bool = True,
    check_copied: bool = True,
) -> SpliceResult:
    """Write the plan's bytes.

    Args:
        checks: of all files of the output, where it has several.
        check_source: check what is read against the source's CRC-32s. Records that are streamed from end to
            end are checked always.
        check_moved: also read what the kernel moved, so that a damaged source is found before the writer
            commits; needless where what was written is proven before that.
        check_copied: likewise what an object store is going to copy, unless it checks that by itself.

    Raises:
        ChecksumMismatchError: source bytes whose CRC-32 is not the stored one.
        SourceChangedError, StorageError: from the stores. CopyRefused: the store will not move anything.
    """
    report = progress or _ignore
    checks = (checks or RecordChecks([plan])) if check_source else RecordChecks([])
    watched = checks.watch(reader)
    pieces = with_moves(plan.pieces, reader, writer)
    moved = sum(piece.nbytes for piece in pieces if isinstance(piece, Move))
    if moved and check_copied and not reader.is_local and not writer.checks_crc32:
        check_copies(plan, reader)
    crcs: dict[int, int] = {}
    overflows: dict[str, CastTally] = {}
    total = 0  # CRC-32 of what was written; every part of it was held against what the source states
    with (
        contextlib.closing(_Streams(pieces, reader, writer)) as streams,
        contextlib.closing(ParallelPieces(pieces, reader, writer, watched)) as ahead,
    ):
        for first, end in iter_runs(pieces, reader):
            piece = pieces[first]
            if end > first + 1:
                data = read_run(pieces[first:end], reader, crcs, checks)
                writer.write(data)
                report(len(data))
                ahead.pass_by(len(data))
                total = crc32_of(data, total)
                continue
            crc = ahead.take(piece, overflows, report)
            if crc is not None:
                assert isinstance(piece, (Computed, Copy))
                _accept(piece, crc, crcs, reader.uri, checks)
            elif isinstance(piece, (Literal, Stated, Deferred)):
                data = _written_out(piece, crcs)
                writer.write(data)
                total = crc32_of(data, total)
            elif isinstance(piece, Computed):
                stream = iter_recipe(piece.recipe, watched, overflows)
                crc = crcs[piece.slot] = _stream(stream, piece, writer, report)
                total = combine_crc32(total, crc, piece.nbytes)
                continue
            elif isinstance(piece, Move):
                if not writer.copy_from(*reader.locate(piece.offset, piece.nbytes), piece.nbytes):
                    for chunk in reader.iter_range(
                        piece.offset, piece.nbytes, chunk_nbytes=STREAM_CHUNK_NBYTES
                    ):
                        writer.write(chunk)
            else:
                crc = streams.write(piece, report)
                _accept(piece, crc, crcs, reader.uri, checks)
                total = combine_crc32(total, crc, piece.nbytes)
                continue
            if crc is not None:
                total = combine_crc32(total, crc, piece.nbytes)
            report(piece.nbytes)
    checks.settle(plan, reader)
    if moved and check_source and check_moved and reader.is_local:
        # Afterwards, because they still lie in memory.
        check_copies(plan, reader)
    overflowed = {what: tally.overflowed for what, tally in overflows.items() if tally.overflowed}
    if moved:
        total = _whole_crc32(plan, crcs)
    return SpliceResult(crcs, total, moved, overflowed, checks.confirmed)


def _ignore(nbytes: int) -> None:
    del nbytes


def _stream(stream: Iterator[bytes], piece: Copy | Computed, writer: Writer, report: Progress) -> int:
    crc = 0
    total = 0
    for chunk in stream:
        crc = crc32_of(chunk, crc)
        writer.write(chunk)
        total += len(chunk)
        report(len(chunk))
    assert total == piece.nbytes, f"{piece.what}: {total} bytes instead of {piece.nbytes}"
    return crc


def _accept(piece: Copy | Computed, crc: int, crcs: dict[int, int], uri: str, checks: RecordChecks) -> None:
    if isinstance(piece, Copy):
        confirm_crc32(uri, piece.what, crc, piece.crc32)
        checks.count_run(uri, piece.offset, piece.nbytes, crc)
    if piece.slot is not None:
        crcs[piece.slot] = crc


class _Streams:
    """The copies of a plan that pass through here; remote ones share one pass over the source.

    Where the writer takes bytes at any place, the threads that receive them put them there.
    """

    def __init__(self, pieces: Sequence[Piece | Move], reader: RangeReader, writer: Writer) -> None:
        self._reader = reader
        self._writer = writer
        self._next = 0
        self._pending: Iterator[tuple[int, bytes]] | None = None
        self._scattered: Iterator[tuple[int, int, int]] | None = None
        if reader.is_local:
            return
        ranges, targets = [], []
        position = 0
        for piece in pieces:
            if isinstance(piece, Copy):
                ranges.append((piece.offset, piece.nbytes))
                targets.append(position)
            position += piece.nbytes
        if writer.scatters:
            self._scattered = reader.scatter(ranges, targets, writer.write_at)
        else:
            self._pending = reader.iter_ranges(ranges)

    def write(self, piece: Copy, report: Progress) -> int:
        """Append a piece; its CRC-32."""
        if self._scattered is None:
            return _stream(self._chunks_of(piece), piece, self._writer, report)
        crc, left = 0, piece.nbytes
        while left:
            owner, part_crc, nbytes = next(self._scattered)
            assert owner == self._next
            crc = combine_crc32(crc, part_crc, nbytes)
            left -= nbytes
            self._writer.advance(nbytes)
            report(nbytes)
        self._next += 1
        return crc

    def _chunks_of(self, piece: Copy) -> Iterator[bytes]:
        if self._pending is None:
            yield from self._reader.iter_range(piece.offset, piece.nbytes, chunk_nbytes=STREAM_CHUNK_NBYTES)
            return
        index = self._next
        self._next += 1
        left = piece.nbytes
        while left:
            owner, chunk = next(self._pending)
            assert owner == index
            left -= len(chunk)
            yield chunk

    def close(self) -> None:
        for iterator in (self._pending, self._scattered):
            if isinstance(iterator, Generator):
                iterator.close()


def check_copies(plan: Plan, reader: RangeReader) -> None:
    """Read every range of the source that the plan takes as it is.

    Raises:
        ChecksumMismatchError: one has another CRC-32 than the source states.
    """
    for piece in plan.pieces:
        if isinstance(piece, Copy) and piece.crc32 is not None:
            found = crc32_of_all(reader.iter_range(piece.offset, piece.nbytes))
            confirm_crc32(reader.uri, piece.what, found, piece.crc32)


def _written_out(piece: Literal | Stated | Deferred, crcs: dict[int, int]) -> bytes:
    if isinstance(piece, Literal):
        return piece.data
    data = piece.build(crcs) if isinstance(piece, Deferred) else piece.build(piece.checksum.value(crcs))
    assert len(data) == piece.nbytes
    return data


def _whole_crc32(plan: Plan, crcs: dict[int, int]) -> int:
    """The CRC-32 of the output by those that the source states, of an output that was moved in part."""
    total = 0
    for piece in plan.pieces:
        if isinstance(piece, (Literal, Stated, Deferred)):
            total = crc32_of(_written_out(piece, crcs), total)
        else:
            crc = piece.crc32 if isinstance(piece, Copy) and piece.crc32 is not None else None
            if crc is None:
                assert piece.slot is not None
                crc = crcs[piece.slot]
            total = combine_crc32(total, crc, piece.nbytes)
    return total
