"""Digests of a stored file and of the tensors in it.

A file is cut into groups of neighbouring records, which threads hash side by side on all cores: one on this
machine by `growing.py`, anything else as it arrives, by `stream.py` (hashlib and zlib release the
interpreter's lock). Views that are not contiguous are hashed by their logical order.

Costs: a stream is read once, a local file once by each of two lanes, out of the page cache the second time;
tensors that are not contiguous once more. Memory is a chunk for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ptbin.proof.groups import Group, GroupHash
from ptbin.proof.growing import GrowingFile
from ptbin.proof.local_file import LocalFile
from ptbin.proof.logical import ReadSpan
from ptbin.proof.regions import strided_sha256
from ptbin.proof.serial import Serial, SerialLane
from ptbin.proof.stream import StreamHash
from ptbin.stores import RangeReader
from ptbin.values.digests import FileDigests, StoredTensor

CHUNK_NBYTES = 4 << 20
SMALL_NBYTES = 1 << 20


def digest_file(
    reader: RangeReader,
    records: Iterable[tuple[int, int]],
    tensors: Iterable[StoredTensor],
    progress: Callable[[int], None] | None = None,
    *,
    serial: Serial = "file",
) -> FileDigests:
    """Hash the file, the records (offset, nbytes) and the tensors in it.

    Args:
        serial: what one more SHA-256 covers: the whole file, or what lies in no tensor.

    Raises:
        SourceChangedError, StorageError: from the store.
    """
    descriptor = reader.fileno() if reader.size > SMALL_NBYTES else None
    if descriptor is not None:
        reader.requests += 1
        reader.bytes_read += reader.size
        return digest_descriptor(
            descriptor, reader.size, records, tensors, progress, reader.read, serial=serial
        )
    distinct = list(dict.fromkeys(tensors))
    strided = [tensor for tensor in distinct if tensor.stride is not None]
    stream = StreamHash(reader.size, records, [t for t in distinct if t.stride is None], serial)
    try:
        position = 0
        for chunk in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
            stream.take(position, chunk)
            position += len(chunk)
            if progress is not None:
                progress(len(chunk))
        found = stream.finish()
    except BaseException:
        stream.give_up()
        raise

    def read(offset: int, nbytes: int) -> Iterator[bytes]:
        return reader.iter_range(offset, nbytes, chunk_nbytes=CHUNK_NBYTES)

    found.tensors.update((tensor, strided_sha256(tensor, read)) for tensor in strided)
    return found


def digest_descriptor(
    descriptor: int,
    size: int,
    records: Iterable[tuple[int, int]],
    tensors: Iterable[StoredTensor],
    progress: Callable[[int], None] | None,
    read: Callable[[int, int], bytes],
    *,
    serial: Serial = "file",
) -> FileDigests:
    """As `digest_file`, of an open file of `size` bytes.

    Args:
        read: called with a range that the file no longer holds; raises the error to report.
    """
    if size > SMALL_NBYTES:
        file = GrowingFile(descriptor, size, records, tensors, read, serial=serial)
        try:
            file.reached(size)
            return file.finish(progress)
        except BaseException:
            file.give_up()
            raise
    # On the calling thread alone: threads would take longer to begin.
    local = LocalFile(descriptor, read, size)
    one = OnePass(size, records, tensors, serial)
    position = 0
    for chunk in local.chunks(0, size):
        one.take(position, chunk)
        position += len(chunk)
    return one.finish(local.pieces)


class OnePass:
    """A file whose bytes come once, in order: one group, and the serial lane."""

    def __init__(
        self, size: int, records: Iterable[tuple[int, int]], tensors: Iterable[StoredTensor], serial: Serial
    ) -> None:
        distinct = dict.fromkeys(tensors)
        streamed = [tensor for tensor in distinct if tensor.stride is None]
        self._strided = [tensor for tensor in distinct if tensor.stride is not None]
        self.group = GroupHash(Group(0, size, list(dict.fromkeys(records)), streamed))
        self.serial = SerialLane(serial, size, streamed)

    def take(self, position: int, chunk: bytes | memoryview) -> None:
        self.serial.take(position, chunk)
        self.group.take(position, chunk)

    def finish(self, read: ReadSpan | None = None) -> FileDigests:
        """The digests. `read` gives the tensors that are not stored contiguously once more; without it they
        are left out.
        """
        found = FileDigests()
        found.crc32 = self.group.finish(found)
        self.serial.finish(found)
        if read is not None:
            found.tensors.update((tensor, strided_sha256(tensor, read)) for tensor in self._strided)
        return found
