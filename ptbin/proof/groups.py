"""A file cut into groups of neighbouring records, each hashed by one thread. Pure.

A group's bytes get one CRC-32 each: those of its records and of what lies between them, of which the group's
is combined, and the file's of its groups'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ptbin.proof.regions import RegionLane
from ptbin.values.crc32 import combine_crc32
from ptbin.values.digests import FileDigests, StoredTensor

COMBINED_NBYTES = 128 << 10
"""Where records are smaller than this on average, a CRC-32 of all bytes takes less time than combinations of
theirs.
"""


@dataclass(slots=True)
class Group:
    """Neighbouring bytes of a file, and the records and tensors that lie in them."""

    start: int
    end: int
    records: list[tuple[int, int]] = field(default_factory=list)
    tensors: list[StoredTensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def tile(self) -> list[tuple[int, int]]:
        """The ranges whose CRC-32s make up the group's: records and the gaps between them, or all in one."""
        whole = [(self.start, self.nbytes)]
        if len(self.records) * COMBINED_NBYTES > self.nbytes:
            return whole
        ranges = []
        position = self.start
        for offset, nbytes in sorted(self.records):
            if offset < position:
                return whole
            if offset > position:
                ranges.append((position, offset - position))
            ranges.append((offset, nbytes))
            position = offset + nbytes
        return [*ranges, (position, self.end - position)] if position < self.end else ranges


class GroupHash:
    """Digests of a group whose bytes come in order."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._found = FileDigests()
        self._tile = group.tile
        self._lane = RegionLane(
            self._found, list(dict.fromkeys([*group.records, *self._tile])), group.tensors
        )

    def take(self, position: int, chunk: bytes | memoryview) -> None:
        self._lane.take(position, chunk)

    def finish(self, found: FileDigests) -> int:
        """Add the digests to `found`; return the CRC-32 of the group."""
        self._lane.finish()
        crc = 0
        for span in self._tile:
            crc = combine_crc32(crc, self._found.records[span], span[1])
        found.records.update((record, self._found.records[record]) for record in self._group.records)
        found.tensors.update(self._found.tensors)
        return crc


def cut_into_groups(
    size: int, records: Iterable[tuple[int, int]], tensors: Iterable[StoredTensor], group_nbytes: int
) -> list[Group]:
    """A file cut between regions; a group ends with the first region that makes it that large."""
    regions: list[tuple[int, int, tuple[int, int] | StoredTensor]] = [(r[0], r[0] + r[1], r) for r in records]
    regions += [(t.offset, t.offset + t.nbytes, t) for t in tensors]
    regions.sort(key=lambda region: region[:2])
    groups = [Group(0, 0)]
    for start, end, region in regions:
        group = groups[-1]
        if start >= group.end and group.nbytes >= group_nbytes:
            group = Group(group.end, group.end)
            groups.append(group)
        group.end = max(group.end, end)
        if isinstance(region, StoredTensor):
            group.tensors.append(region)
        else:
            group.records.append(region)
    groups[-1].end = max(groups[-1].end, size)
    return groups
