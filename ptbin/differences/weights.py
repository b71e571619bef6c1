"""Pairs of tensors, read side by side and compared: on all cores where both lie on this machine.

A pair is compared bit by bit until its first difference; from there on its elements are counted. Only the
tensors that differ are read again: what came before the difference, for the cosine, and the records that
state a CRC-32, so that a damaged file is reported as damaged and not as different. Large tensors are cut,
small neighbours put together. Other places are read as one stream each, ahead of the comparison.

Costs: every byte of both sides once; of the tensors that differ, the records with a CRC-32 once more. Memory:
a few MiB for each thread, and what the stores read ahead.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from ptbin.cores import available_cores
from ptbin.differences.numbers import BLOCK, Tally, Tolerance, has_numbers, resolve_lazy, same_bytes
from ptbin.differences.streams import Feed, is_plain, iter_views, part_of
from ptbin.stores import RangeReader
from ptbin.values.crc32 import confirm_crc32, crc32_of_all
from ptbin.values.tensors import ByteRange, TensorRef

GROUP_NBYTES = 32 << 20
"""Of work that one thread does at a time."""

T = TypeVar("T")
Progress = Callable[[int], None]


class _Openable(Protocol):
    """A side, as far as its weights are concerned."""

    def open_weights(self) -> RangeReader: ...


@dataclass(eq=False, slots=True)
class _Part:
    """Elements of a pair: `same` of them are equal from the start on; `tally` counts what follows."""

    a: TensorRef
    b: TensorRef
    base: int
    same: int = 0
    tally: Tally | None = None


@dataclass(eq=False, slots=True)
class Pair:
    """Two tensors of one shape, whose types are the same or both have numbers."""

    a: TensorRef
    b: TensorRef
    parts: list[_Part] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        return any(part.tally is not None for part in self.parts)

    def tally(self) -> Tally:
        whole = Tally()
        for part in self.parts:
            if part.tally is not None:
                whole.merge(part.tally)
        return whole


class Readers:
    """Each thread's own pair of readers: those of several files are not made for two threads at once."""

    def __init__(self, a: _Openable, b: _Openable) -> None:
        self._sides = (a, b)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._opened: list[RangeReader] = []

    def of(self, side: int) -> RangeReader:
        """The calling thread's reader of side 0 or 1."""
        name = f"side{side}"
        reader: RangeReader | None = getattr(self._local, name, None)
        if reader is None:
            reader = self._sides[side].open_weights()
            with self._lock:
                self._opened.append(reader)
            setattr(self._local, name, reader)
        return reader

    def threads(self, sides: Sequence[int]) -> int:
        """How many are worth it: a store elsewhere is read ahead by its reader instead."""
        return available_cores() if all(self.of(side).is_local for side in sides) else 1

    @property
    def bytes_read(self) -> int:
        return sum(reader.bytes_read for reader in self._opened)

    def check_unchanged(self) -> None:
        """Raises SourceChangedError where a source is no longer what was read."""
        for reader in self._opened:
            reader.check_unchanged()

    def close(self) -> None:
        for reader in self._opened:
            reader.close()


def compare_pairs(
    pairs: Sequence[Pair], readers: Readers, tolerance: Tolerance, progress: Progress | None = None
) -> None:
    """Fill in every pair's parts.

    Raises:
        ChecksumMismatchError, CorruptArchiveError: a tensor that differs is damaged.
        SourceChangedError, StorageError: from the stores.
    """
    if not pairs:
        return
    threads = readers.threads((0, 1))
    for pair in pairs:
        pair.parts = list(_cut(pair)) if threads > 1 else [_Part(pair.a, pair.b, 0)]
    parts = sorted((part for pair in pairs for part in pair.parts), key=lambda part: _order(part.a))
    groups = _grouped(parts, [part.a.nbytes + part.b.nbytes for part in parts], threads)
    _run([partial(_compare, group, readers, tolerance, progress) for group in groups], threads)
    different = [pair for pair in pairs if pair.differs]
    jobs: list[Callable[[], None]] = []
    for side in (0, 1):
        jobs += [partial(_check_crc32, record, readers, side) for record in _records(different, side)]
    equal = [part for pair in different for part in pair.parts if part.same and has_numbers(part.a.dtype)]
    jobs += [partial(_count_equal, part, readers) for part in equal]
    _run(jobs, threads)


def hash_views(
    views: Sequence[TensorRef], readers: Readers, side: int, progress: Progress | None = None
) -> list[str]:
    """SHA-256 of each tensor's logical bytes, as manifests state it."""
    found = [""] * len(views)
    if not views:
        return found
    threads = readers.threads((side,))
    numbers = sorted(range(len(views)), key=lambda number: _order(views[number]))

    def work(group: list[int]) -> None:
        feed = Feed(pieces := iter_views([views[number] for number in group], readers.of(side)))
        with closing(pieces):
            for number in group:
                digest = hashlib.sha256()
                left = views[number].nbytes
                while left:
                    block = feed.take(min(left, 1 << 20))
                    digest.update(block)
                    left -= len(block)
                found[number] = digest.hexdigest()
                if progress is not None:
                    progress(views[number].nbytes)

    groups = _grouped(numbers, [views[number].nbytes for number in numbers], threads)
    _run([partial(work, group) for group in groups], threads)
    return found


def _order(view: TensorRef) -> tuple[int, int]:
    place = view.storage.place
    return (place.offset, view.span[0]) if isinstance(place, ByteRange) else (1 << 63, 0)


def _cut(pair: Pair) -> Iterator[_Part]:
    """Pieces of a large tensor, where both sides can be read from any element on."""
    a, b = pair.a, pair.b
    step = max(BLOCK, GROUP_NBYTES // max(a.dtype.itemsize, b.dtype.itemsize) // BLOCK * BLOCK)
    if a.numel <= step or not (is_plain(a) and is_plain(b)):
        yield _Part(a, b, 0)
        return
    for start in range(0, a.numel, step):
        count = min(step, a.numel - start)
        yield _Part(part_of(a, start, count), part_of(b, start, count), start)


def _grouped(items: Sequence[T], sizes: Sequence[int], threads: int) -> list[list[T]]:
    """Neighbours of about `GROUP_NBYTES` together; all of them, for one thread."""
    if threads == 1:
        return [list(items)]
    groups: list[list[T]] = [[]]
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if total and total + size > GROUP_NBYTES:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += max(size, 1)
    return groups


def _run(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    if threads == 1 or len(jobs) <= 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(min(threads, len(jobs)), thread_name_prefix="ptbin-diff") as pool:
        pending = [pool.submit(job) for job in jobs]
        try:
            for task in pending:
                task.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compare(parts: list[_Part], readers: Readers, tolerance: Tolerance, progress: Progress | None) -> None:
    pieces_a = iter_views([part.a for part in parts], readers.of(0))
    pieces_b = iter_views([part.b for part in parts], readers.of(1))
    with closing(pieces_a), closing(pieces_b):
        a, b = Feed(pieces_a), Feed(pieces_b)
        for part in parts:
            _compare_part(part, a, b, tolerance)
            if progress is not None:
                progress(part.a.nbytes + part.b.nbytes)
        for pieces in (pieces_a, pieces_b):
            for _ in pieces:  # no bytes are left; streams check their CRC-32 at the end
                pass


def _compare_part(part: _Part, a: Feed, b: Feed, tolerance: Tolerance) -> None:
    types = (part.a.dtype, part.b.dtype)
    lazy = part.a.flags != part.b.flags
    position, elements = 0, part.a.numel
    while position < elements:
        count = min(BLOCK, elements - position)
        block_a, block_b = (
            side.take(dtype.nbytes_of(count)) for side, dtype in ((a, types[0]), (b, types[1]))
        )
        if lazy:
            block_a = resolve_lazy(block_a, types[0], part.a.flags)
            block_b = resolve_lazy(block_b, types[1], part.b.flags)
        if part.tally is None and types[0] is types[1] and same_bytes(block_a, block_b):
            part.same += count
        else:
            tally = part.tally or Tally()
            tally.add(block_a, block_b, types, part.base + position, tolerance)
            # types that differ have no bits to compare: what is equal in value is equal
            part.tally = tally
        position += count


def _count_equal(part: _Part, readers: Readers) -> None:
    """What the elements before the first difference add to the cosine of a pair that differs."""
    tally = part.tally = part.tally or Tally()
    with closing(iter_views([part.a], readers.of(0))) as pieces:
        feed = Feed(pieces)
        for start in range(0, part.same, BLOCK):
            count = min(BLOCK, part.same - start)
            tally.add_equal(feed.take(part.a.dtype.nbytes_of(count)), part.a.dtype)


def _records(pairs: Sequence[Pair], side: int) -> list[ByteRange]:
    """The records behind these tensors that state a CRC-32."""
    places = [(pair.b if side else pair.a).storage.place for pair in pairs]
    return list({p.offset: p for p in places if isinstance(p, ByteRange) and p.crc32 is not None}.values())


def _check_crc32(place: ByteRange, readers: Readers, side: int) -> None:
    reader = readers.of(side)
    found = crc32_of_all(reader.iter_range(place.offset, place.nbytes))
    confirm_crc32(reader.uri, place.member, found, place.crc32)
