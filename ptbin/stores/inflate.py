"""Deflated members as streams: length and CRC-32 checked, memory bounded whatever the ratio."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ptbin.errors import ChecksumMismatchError, CorruptArchiveError
from ptbin.values.crc32 import crc32_of
from ptbin.values.tensors import Deflated

if TYPE_CHECKING:
    from ptbin.stores import RangeReader

CHUNK_NBYTES = 4 << 20


def iter_inflated(
    place: Deflated, reader: RangeReader, offset: int = 0, nbytes: int | None = None
) -> Iterator[bytes]:
    """The content of a deflated member, or a part of it; length and CRC-32 of all of it are checked."""
    position, end = 0, place.nbytes if nbytes is None else offset + nbytes
    for piece in _iter_inflated(place, reader):
        first, last = max(offset - position, 0), min(end - position, len(piece))
        if first < last:
            yield piece[first:last]
        position += len(piece)


def _iter_inflated(place: Deflated, reader: RangeReader) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    crc = 0
    total = 0
    where = f"{reader.uri}: member {place.member!r}"
    for chunk in reader.iter_range(place.offset, place.compressed_nbytes, chunk_nbytes=CHUNK_NBYTES):
        waiting = chunk
        while waiting:
            try:
                piece = inflater.decompress(waiting, CHUNK_NBYTES)
            except zlib.error as error:
                raise CorruptArchiveError(f"{where} does not inflate: {error}") from error
            waiting = inflater.unconsumed_tail
            total += len(piece)
            if total > place.nbytes:
                raise CorruptArchiveError(f"{where} inflates to more than the {place.nbytes} bytes stated")
            crc = crc32_of(piece, crc)
            if piece:
                yield piece
            elif inflater.eof:
                break
    rest = inflater.flush()
    total += len(rest)
    crc = crc32_of(rest, crc)
    if rest:
        yield rest
    if total != place.nbytes:
        raise CorruptArchiveError(f"{where} inflates to {total} bytes, {place.nbytes} are stated")
    if place.crc32 is not None and crc != place.crc32:
        raise ChecksumMismatchError(f"{where} has CRC-32 {crc:08x}, the archive states {place.crc32:08x}")
