"""One output file as it grows: pieces, records, CRC-32 slots. Every format lays itself out with this."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ptbin.values.nodes import DictNode
from ptbin.values.segments import (
    Assemble,
    Cast,
    Checksum,
    Computed,
    Copy,
    Literal,
    Piece,
    Plan,
    Recipe,
    RecordLayout,
    Slice,
    Swap,
    nbytes_of,
)
from ptbin.values.tensors import ByteRange
from ptbin.writing.casts import Casts


@dataclasses.dataclass(frozen=True, slots=True)
class FileContent:
    """What one file of an output is to hold.

    Attributes:
        entries: names and values, in order.
        mapping_kind: of the state dict, `OrderedDict` or `dict`.
        metadata: the state dict's `_metadata`; None where it has none, and in later shards.
        archive_root: the source's archive root where it is a torch zip, else None.
    """

    name: str
    entries: list[tuple[str, Any]]
    casts: Casts
    mapping_kind: str
    metadata: DictNode | None
    archive_root: str | None


def whole_range(recipes: tuple[Recipe, ...]) -> ByteRange | None:
    """The source range that the recipes are, from end to end and unchanged; None where they are not one."""
    if len(recipes) != 1 or not isinstance(recipes[0], Slice):
        return None
    place = recipes[0].place
    if isinstance(place, ByteRange) and recipes[0].offset == 0 and recipes[0].nbytes == place.nbytes:
        return place
    return None


class FileLayout:
    """Pieces one behind the other; `offset` is where the next one begins."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.offset = 0
        self.records: list[RecordLayout] = []
        self._slots = 0

    def add(self, piece: Piece) -> None:
        last = self.pieces[-1] if self.pieces else None
        if isinstance(piece, Literal) and isinstance(last, Literal):
            self.pieces[-1] = Literal(last.data + piece.data)
        elif piece.nbytes or not isinstance(piece, Literal):
            self.pieces.append(piece)
        self.offset += piece.nbytes

    def align(self, alignment: int) -> None:
        """Zeros up to a multiple of `alignment`."""
        self.add(Literal(bytes(-self.offset % alignment)))

    def body(self, key: str, recipes: tuple[Recipe, ...]) -> RecordLayout:
        """Add the bytes of one record; what is not known of its CRC-32 gets a slot."""
        start = self.offset
        what = f"storage {key}"
        parts: list[tuple[int | None, int | None, int]] = []
        for recipe in recipes:
            nbytes = recipe.nbytes
            if not nbytes:
                continue
            if isinstance(recipe, Cast):
                recipe = dataclasses.replace(recipe, what=key)  # overflows are counted by record
            place = whole_range((recipe,))
            crc = place.crc32 if place is not None else None
            slot = None if crc is not None else self._slot()
            if isinstance(recipe, Slice) and isinstance(recipe.place, ByteRange):
                name = recipe.place.member or what
                self.add(Copy(recipe.place.offset + recipe.offset, nbytes, crc, slot, name))
            else:
                assert slot is not None
                self.add(Computed(recipe, slot, what))
            parts.append((crc, slot, nbytes))
        checksum = Checksum(tuple(parts))
        record = RecordLayout(key, start, nbytes_of(recipes), checksum, _taken_in_part(recipes))
        self.records.append(record)
        return record

    def _slot(self) -> int:
        self._slots += 1
        return self._slots - 1

    def finish(self) -> Plan:
        return Plan(tuple(self.pieces), self.offset, tuple(self.records))


def _taken_in_part(recipes: tuple[Recipe, ...]) -> tuple[ByteRange, ...]:
    """Records with a stated CRC-32 that do not go along from end to end as they are."""
    found: dict[ByteRange, None] = {}
    for recipe in recipes:
        whole = whole_range((recipe,))
        if whole is not None and whole.crc32 is not None:
            continue
        for place in _places(recipe):
            record = place.record if place.crc32 is None else place
            if record is not None:
                found[record] = None
    return tuple(found)


def _places(recipe: Recipe) -> Iterator[ByteRange]:
    """The ranges of the source that a recipe reads from."""
    if isinstance(recipe, Cast):
        for inner in recipe.inner:
            yield from _places(inner)
    elif isinstance(recipe, Swap):
        yield from _places(recipe.inner)
    elif isinstance(recipe, Assemble):
        yield from (tile.place for tile in recipe.tiled.tiles if isinstance(tile.place, ByteRange))
    elif isinstance(recipe.place, ByteRange):
        yield recipe.place
