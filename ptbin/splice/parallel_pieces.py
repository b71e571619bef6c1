"""Pieces that pass through this process, several at once: between two local files, on the cores there are.

Casts, gathers and copies whose CRC-32 is not known before are read, computed and put at their place by
threads; the caller goes through the plan in order and finds them done. NumPy, zlib and the system's calls let
go of the interpreter's lock. Memory is that of one stream for each thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from ptbin.cores import spare_cores
from ptbin.splice.moves import Move
from ptbin.splice.recipes import iter_recipe
from ptbin.stores import RangeReader, Writer
from ptbin.values.crc32 import crc32_of
from ptbin.values.segments import Computed, Copy, Piece

if TYPE_CHECKING:
    from ptbin.splice.casting import CastTally

MAX_THREADS = 8
MIN_NBYTES = 1 << 20
"""Shorter pieces are done by the caller: handing one over takes as long."""
CHUNK_NBYTES = 4 << 20
REPORT_SECONDS = 0.25

_Tallies = dict[str, "CastTally"]


class ParallelPieces:
    """Works ahead of the caller, which goes through `pieces`; must be closed. Recipes read from `watched`."""

    def __init__(
        self, pieces: Sequence[Piece | Move], reader: RangeReader, writer: Writer, watched: RangeReader
    ) -> None:
        self._reader, self._writer, self._watched = reader, writer, watched
        self._waiting: deque[tuple[int, Computed | Copy]] = deque()
        self._running: dict[int, Future[tuple[int, _Tallies]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._given_up = False
        self._position = 0
        threads = min(MAX_THREADS, spare_cores())
        if not (reader.is_shareable and writer.scatters) or threads < 2:
            return
        position = 0
        for piece in pieces:
            if isinstance(piece, (Computed, Copy)) and piece.nbytes >= MIN_NBYTES:
                self._waiting.append((position, piece))
            position += piece.nbytes
        if len(self._waiting) < 2:
            self._waiting.clear()
            return
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ptbin-splice")
        for _ in range(2 * threads):
            self._begin_next()

    def _begin_next(self) -> None:
        if self._waiting and self._pool is not None:
            position, piece = self._waiting.popleft()
            self._running[position] = self._pool.submit(self._run, position, piece)

    def _run(self, position: int, piece: Computed | Copy) -> tuple[int, _Tallies]:
        tallies: _Tallies = {}
        stream: Iterator[bytes]
        if isinstance(piece, Computed):
            stream = iter_recipe(piece.recipe, self._watched, tallies)
        else:
            stream = self._reader.iter_range(piece.offset, piece.nbytes, chunk_nbytes=CHUNK_NBYTES)
        crc, done = 0, 0
        for chunk in stream:
            if self._given_up:
                break
            crc = crc32_of(chunk, crc)
            self._writer.write_at(position + done, memoryview(chunk))
            done += len(chunk)
        assert done == piece.nbytes or self._given_up, f"{piece.what}: {done} bytes, not {piece.nbytes}"
        return crc, tallies

    def pass_by(self, nbytes: int) -> None:
        """The caller has written small pieces of so many bytes."""
        self._position += nbytes

    def take(self, piece: Piece | Move, tallies: _Tallies, report: Callable[[int], None]) -> int | None:
        """CRC-32 of the next piece, which is in its place now; None where the caller has to write it.

        Raises what the source or the destination raised.
        """
        position = self._position
        self._position += piece.nbytes
        running = self._running.pop(position, None) if piece.nbytes else None
        if running is None:
            return None
        while not running.done():
            wait([running], REPORT_SECONDS)
            report(0)
        crc, own = running.result()
        self._begin_next()
        for what, tally in own.items():
            if what in tallies:
                tallies[what].overflowed += tally.overflowed
            else:
                tallies[what] = tally
        self._writer.advance(piece.nbytes)
        return crc

    def close(self) -> None:
        self._given_up = True
        for running in self._running.values():
            running.cancel()
        wait(self._running.values())
        if self._pool is not None:
            self._pool.shutdown()
