"""The law of accounting: every storage of a source is taken, or left out under a known role, or stops the
conversion.

Bytes are counted as intervals of one address space: a file's own offsets, and invented ones for what only
exists in memory (numpy arrays, nested files) or is stored compressed. Everything claims the intervals it
views: first the selected tensors in their order, then what is left out in its order, last every storage that
the container holds. Each byte belongs to its first claimant, so the parts add up to the whole by
construction; what only the last round claims is unaccounted. Works on what every container's reader gives;
knows no container.

Costs: a sort of the claims, some 120 bytes a claim; no I/O.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.roles import REASONS
from ptbin.reading.tree import Data, iter_data
from ptbin.values.nodes import NdArray, Opaque
from ptbin.values.state_dict import Excluded, LeftOut, iter_tensors, tensors_of
from ptbin.values.tensors import ByteRange, InMemory, Joined, Place, Storage, TensorRef, Tiled, TypedStorage


@dataclass(frozen=True, slots=True)
class Unaccounted:
    """Bytes that nothing explains: where, and how many."""

    path: str
    nbytes: int


@dataclass(slots=True)
class Accounting:
    """Where every byte of a source's storages went. `source_nbytes` is the sum of the others.

    Attributes:
        left_out: what does not go along, in the order of the file; several may be of one role.
        unaccounted: empty in everything that is published.
        credits: for each tensor of the selection, in order, the source's bytes that it alone accounts for.
    """

    source_nbytes: int
    taken_nbytes: int
    left_out: list[LeftOut]
    unaccounted: list[Unaccounted]
    credits: list[int] = field(default_factory=list)

    def by_role(self) -> dict[str, int]:
        """Bytes left out, largest first; roles without bytes are not in it."""
        found: dict[str, int] = {}
        for item in self.left_out:
            if item.nbytes:
                found[item.role] = found.get(item.role, 0) + item.nbytes
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def to_json(self) -> dict[str, Any]:
        """The manifest's `accounting`."""
        return {
            "source_tensor_bytes": self.source_nbytes,
            "taken_bytes": self.taken_nbytes,
            "left_out": self.by_role(),
        }


def account(
    checkpoint: Checkpoint, taken: Iterable[tuple[str, Any]], excluded: Iterable[Excluded]
) -> Accounting:
    """Count every storage of the checkpoint.

    Args:
        taken: (name, value) of everything selected.
        excluded: what is left out, the first claimant first; a role of None is unaccounted.
    """
    space = _AddressSpace()
    claims = _Claims()
    views: list[TensorRef] = []
    for _, tensor in iter_tensors(taken):
        claims.add(len(views), space.of_view(tensor))
        views.append(tensor)
    first_excluded = len(views)
    items = list(excluded)
    seen: set[int] = set()
    for offset, item in enumerate(items):
        for data in iter_data(item.node, seen):
            claims.add(first_excluded + offset, space.of_data(data))
    for name, offset, nbytes in checkpoint.unnamed:
        claims.add(first_excluded + len(items), [(offset, offset + nbytes)])
        items.append(Excluded(name, "unreferenced"))
    first_unit = first_excluded + len(items)
    units: list[str] = []
    for label, intervals in _units(checkpoint, space):
        claims.add(first_unit + len(units), intervals)
        units.append(label)
    shares = claims.settle(first_unit + len(units))

    gaps, hidden = _unviewed(checkpoint, views, shares[first_unit:])
    left_out = []
    unaccounted = []
    by_container = {id(item) for item in checkpoint.excluded}
    for item, nbytes in zip(items, shares[first_excluded:first_unit], strict=True):
        if not nbytes and (item.role in ("attribute", "padding") or id(item) in by_container):
            continue  # one more way to what is accounted for: recurrent layers keep a list of their weights
        if item.role is not None:
            left_out.append(LeftOut(item.path, nbytes, item.role, item.reason or REASONS[item.role]))
        elif nbytes:
            unaccounted.append(Unaccounted(item.path, nbytes))
    if hidden:
        left_out.append(LeftOut("(storages)", hidden, "unviewed", REASONS["unviewed"]))
    unaccounted.extend(
        Unaccounted(label, nbytes) for label, nbytes in zip(units, gaps, strict=True) if nbytes
    )
    taken_nbytes = sum(shares[:first_excluded])
    total = sum(shares)
    parts = taken_nbytes + sum(item.nbytes for item in left_out) + sum(item.nbytes for item in unaccounted)
    if parts != total:
        raise AssertionError(f"{checkpoint.uri}: {total} bytes of storages, {parts} accounted for")
    return Accounting(total, taken_nbytes, left_out, unaccounted, shares[:first_excluded])


def _unviewed(checkpoint: Checkpoint, views: list[TensorRef], rest: list[int]) -> tuple[list[int], int]:
    """Of the bytes that only the container claims: those that nothing explains, and those of storages in use.

    torch.save writes a storage whole, whatever part of it tensors show: the rest belongs to no tensor at all.
    """
    if not any(rest):
        return rest, 0
    used = {id(tensor.storage) for tensor in views}
    # of a file that lies inside a pickle the container knows the bytes, and not the storages
    used |= {id(t.storage.place.data) for t in views if isinstance(t.storage.place, InMemory)}
    in_use = [id(storage) in used for storage in checkpoint.storages.values()]
    in_use += [id(blob) in used for blob in checkpoint.vocabulary.blobs()]
    hidden = sum(nbytes for nbytes, known in zip(rest, in_use, strict=True) if known)
    return [0 if known else nbytes for nbytes, known in zip(rest, in_use, strict=True)], hidden


def _units(checkpoint: Checkpoint, space: _AddressSpace) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Everything that the container holds: storages first, in the order of `checkpoint.storages`."""
    for key, storage in checkpoint.storages.items():
        yield f"storage {key}", space.of_storage(storage)
    for blob in checkpoint.vocabulary.blobs():
        yield "bytes inside the pickle", space.of_memory(blob)


class _Claims:
    """Intervals and who claims them. Owners count from 0; the lower number wins."""

    def __init__(self) -> None:
        self._starts = array("q")
        self._ends = array("q")
        self._owners = array("q")
        self._claimed: dict[int, int] = {}

    def add(self, owner: int, intervals: Iterable[tuple[int, int]]) -> None:
        """Owners in ascending order."""
        for start, end in intervals:
            # What was claimed before just so is lost to this owner: a storage behind its only view, mostly.
            if end > start and self._claimed.get(start) != end:
                self._claimed.setdefault(start, end)
                self._starts.append(start)
                self._ends.append(end)
                self._owners.append(owner)

    def settle(self, owners: int) -> list[int]:
        """Bytes that each owner is the first to claim."""
        shares = [0] * owners
        starts, ends = self._starts, self._ends
        order = sorted(range(len(starts)), key=starts.__getitem__)
        if all(ends[one] <= starts[other] for one, other in itertools.pairwise(order)):
            for index in order:
                shares[self._owners[index]] += ends[index] - starts[index]
            return shares
        active: list[tuple[int, int]] = []
        position = starts[order[0]] if order else 0
        for index in order:
            start = starts[index]
            position = _sweep(active, shares, position, start)
            position = max(position, start)
            heapq.heappush(active, (self._owners[index], ends[index]))
        _sweep(active, shares, position, None)
        return shares


def _sweep(active: list[tuple[int, int]], shares: list[int], position: int, until: int | None) -> int:
    """Give the bytes from `position` up to `until` (None: to the end) to the first of the active claims."""
    while active and (until is None or position < until):
        owner, end = active[0]
        if end <= position:
            heapq.heappop(active)
            continue
        stop = end if until is None else min(end, until)
        shares[owner] += stop - position
        position = stop
    return position


class _AddressSpace:
    """Where storages and views lie, as intervals that never overlap by accident."""

    def __init__(self) -> None:
        self._invented: dict[object, int] = {}
        self._next = 0
        self._kept: list[Any] = []

    def of_memory(self, data: bytes | bytearray) -> list[tuple[int, int]]:
        if not data:
            return []
        self._kept.append(data)  # an id is unique only while its object lives
        start = self._region(id(data), len(data))
        return [(start, start + len(data))]

    def _region(self, key: object, nbytes: int) -> int:
        """Invented addresses are negative: no file has them."""
        start = self._invented.get(key)
        if start is None:
            self._next -= nbytes
            start = self._invented[key] = self._next
        return start

    def of_storage(self, storage: Storage) -> list[tuple[int, int]]:
        return self._of_place(storage.place, storage, 0, storage.nbytes)

    def of_view(self, tensor: TensorRef) -> list[tuple[int, int]]:
        start, end = tensor.span
        return self._of_place(tensor.storage.place, tensor.storage, start, end)

    def of_data(self, data: Data) -> list[tuple[int, int]]:
        if isinstance(data, (bytes, bytearray)):
            return self.of_memory(data)
        if isinstance(data, NdArray):
            return self.of_memory(data.data)
        if isinstance(data, TypedStorage):
            return self.of_storage(data.storage)
        if isinstance(data, Opaque):
            return []
        # The whole storage: what is left out is left out with all that was saved for it.
        return [
            interval for _, tensor in tensors_of("", data) for interval in self.of_storage(tensor.storage)
        ]

    def _of_place(self, place: Place | None, storage: Storage, start: int, end: int) -> list[tuple[int, int]]:
        if end <= start:
            return []
        if isinstance(place, ByteRange):
            return [(place.offset + start, place.offset + end)]
        if isinstance(place, InMemory):
            base = self.of_memory(place.data)[0][0]
            return [(base + start, base + end)]
        if isinstance(place, Joined):
            return list(self._of_parts(place, storage, start, end))
        if isinstance(place, Tiled):
            return [
                interval
                for tile in place.tiles
                for interval in self._of_place(tile.place, storage, 0, tile.place.nbytes)
            ]
        key = ("deflated", place.offset) if place is not None else ("storage", id(storage))
        base = self._region(key, storage.nbytes)
        return [(base + start, base + end)]

    def _of_parts(self, place: Joined, storage: Storage, start: int, end: int) -> Iterator[tuple[int, int]]:
        position = 0
        for part in place.parts:
            first, last = max(start - position, 0), min(end - position, part.nbytes)
            if first < last:
                yield from self._of_place(part, storage, first, last)
            position += part.nbytes
