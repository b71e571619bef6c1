"""Chunks of a `torch.distributed.checkpoint` folder: a `torch.save` archive each, or one safetensors blob.

Costs: of every chunk the first and last KiB, in the order of the files: neighbours share requests, so about
one a chunk; far fewer where chunks are small or the store bridges gaps (it then fetches the weights between
and drops them). Memory: one record a chunk. Source: torch/distributed/checkpoint/filesystem.py, 2.13.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedFormatError
from ptbin.options import Limits
from ptbin.reading.containers.checkpoint import Opening
from ptbin.reading.containers.dcp.index import Entry, Span
from ptbin.reading.containers.safetensors import looks_like_safetensors
from ptbin.reading.containers.source import SourceFile, Window
from ptbin.stores.joined import JoinedReader
from ptbin.values.framing import LOCAL_HEADER
from ptbin.values.nodes import DictNode, Opaque
from ptbin.values.tensors import ByteRange, Place

# An archive of one tensor by torch 2.13: the pickle and what stands before the data take 0.7 KiB, the
# directory and its end 0.6 KiB. What does not fit costs that chunk a request more.
EDGE_NBYTES = 1024
BATCH = 512
"""Chunks whose edges are in memory at once."""


class _ChunkFile(SourceFile):
    """A `SourceFile` whose edges were read along with its neighbours' and are small."""

    def __init__(self, window: Window, edges: Sequence[tuple[int, bytes]]) -> None:
        super().__init__(window)
        self._blocks.extend(edges)

    def head(self, nbytes: int) -> bytes:
        known = self._cached(0, min(nbytes, self.size))
        return super().head(nbytes) if known is None else known

    def tail(self, nbytes: int) -> tuple[int, bytes]:
        offset, last = self._blocks[-1] if self._blocks else (0, b"")
        if offset + len(last) == self.size and b"PK\x05\x06" in last:
            return offset, last
        return super().tail(nbytes)


class Chunks:
    """What lies in the spans that an index names."""

    def __init__(self, reader: JoinedReader, opening: Opening, limits: Limits) -> None:
        self._reader = reader
        self._opening = opening
        self._limits = limits
        self._blobs: dict[int, dict[str, Any]] = {}

    def read_all(self, entries: list[Entry]) -> dict[tuple[Span, str | None], Any]:
        """(span, None) to what its archive holds, (span, name) to a tensor of a safetensors blob.

        An object that is not a torch archive (a planner may store any bytes) is an `Opaque`.
        """
        wanted: dict[Span, list[str]] = {}
        objects: set[Span] = set()
        for entry in entries:
            for chunk in entry.chunks:
                wanted.setdefault(chunk.span, []).append(entry.name)
            if entry.span is not None:
                wanted.setdefault(entry.span, [])
                objects.add(entry.span)
        found: dict[tuple[Span, str | None], Any] = {}
        ordered = iter(sorted(wanted, key=lambda span: (span.offset, span.nbytes)))
        while batch := list(islice(ordered, BATCH)):
            for span, file in self._files(batch):
                if span not in objects and (blob := self._blob(span, file)) is not None:
                    found.update({(span, name): blob.get(name) for name in wanted[span]})
                else:
                    found[span, None] = self._archive(span, file, is_object=span in objects)
        return found

    def _files(self, spans: list[Span]) -> Iterator[tuple[Span, _ChunkFile]]:
        """Each span with its edges read: neighbours share requests."""
        ranges: list[tuple[int, int]] = []
        pieces: list[list[tuple[int, int]]] = []  # of each span: (range, offset in the span)
        for span in spans:
            small = span.nbytes <= 2 * EDGE_NBYTES
            last = (span.nbytes - EDGE_NBYTES, EDGE_NBYTES)
            edges = [(0, span.nbytes)] if small else [(0, EDGE_NBYTES), last]
            pieces.append([(len(ranges) + i, inner) for i, (inner, _) in enumerate(edges)])
            ranges.extend((span.offset + inner, nbytes) for inner, nbytes in edges)
        read = [bytearray() for _ in ranges]
        for index, data in self._reader.iter_ranges(ranges):
            read[index] += data
        for span, edges in zip(spans, pieces, strict=True):
            uri = f"{self._reader.uri}/{span.file} at byte {span.offset - self._base(span)}"
            window = Window(self._reader, span.offset, span.nbytes, uri)
            yield span, _ChunkFile(window, [(inner, bytes(read[index])) for index, inner in edges])

    def _base(self, span: Span) -> int:
        return self._reader.part(span.file).base

    def _archive(self, span: Span, file: _ChunkFile, *, is_object: bool) -> Any:
        """The record in one span, its storages placed in the folder's address space."""
        inner = self._open(file)
        try:
            checkpoint = inner.checkpoint()
        except UnsupportedFormatError as error:
            if not is_object:
                raise CorruptArchiveError(f"{file.uri}: expected a tensor: {error}") from error
            return Opaque("object", "bytes that are not a torch.save archive", has_data=False)
        checkpoint.move(span.offset, lambda place: _without_framing(file, place))
        self._opening.keep_programs(inner.programs)
        return checkpoint.root

    def _blob(self, span: Span, file: _ChunkFile) -> dict[str, Any] | None:
        """The tensors of the safetensors blob that begins where the span does; None where none does.

        Every tensor in it is listed with the blob's offset and the tensor's own length.
        """
        if span.offset in self._blobs:
            return self._blobs[span.offset]
        if file.size >= 4 and file.head(4) == b"PK\x03\x04":
            return None
        rest = self._reader.part(span.file).size - (span.offset - self._base(span))
        whole = SourceFile(Window(self._reader, span.offset, rest, file.uri))
        if not looks_like_safetensors(whole.head(512), rest):
            return None
        checkpoint = self._open(whole).checkpoint()
        if not isinstance(checkpoint.root, DictNode):
            raise CorruptArchiveError(f"{file.uri}: expected a safetensors blob")
        checkpoint.move(span.offset)
        self._blobs[span.offset] = checkpoint.root.by_name()
        return self._blobs[span.offset]

    def _open(self, file: SourceFile) -> Opening:
        return self._opening.another(file, programs=[])


def _without_framing(file: SourceFile, place: Place) -> Place:
    """A place inside a chunk's archive without its framing, which counts from the archive's own beginning.

    The local header has been read and must put the data where the directory does.
    """
    if isinstance(place, ByteRange) and place.record_offset is not None:
        header = file.read(place.record_offset, LOCAL_HEADER.size, "local header")
        *_, name_nbytes, extra_nbytes = LOCAL_HEADER.unpack(header)
        stated = place.record_offset + LOCAL_HEADER.size + name_nbytes + extra_nbytes
        if header[:4] != b"PK\x03\x04" or stated != place.offset:
            raise CorruptArchiveError(
                f"{file.uri}: member {place.member!r} should begin at byte {place.offset}, "
                f"its local header says {stated}"
            )
        return dataclasses.replace(place, record_offset=None, closed=False)
    return place
