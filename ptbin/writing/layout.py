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
        self.offset = 0
        self.records: list[RecordLayout] = []
        self._pieces: list[Piece] = []
        self._texts: list[bytes] = []
        """Literal bytes behind the last piece; joined when another one follows."""
        self._slots = 0

    def add(self, piece: Piece) -> None:
        if self._texts:
            self._end_text()
        self._pieces.append(piece)
        self.offset += piece.nbytes

    def text(self, data: bytes) -> None:
        """Add bytes as they are."""
        if data:
            self._texts.append(data)
            self.offset += len(data)

    def _end_text(self) -> None:
        self._pieces.append(Literal(self._texts[0] if len(self._texts) == 1 else b"".join(self._texts)))
        self._texts.clear()

    def align(self, alignment: int) -> None:
        """Zeros up to a multiple of `alignment`."""
        self.text(bytes(-self.offset % alignment))

    def body(self, key: str, recipes: tuple[Recipe, ...]) -> RecordLayout:
        """Add the bytes of one record; what is not known of its CRC-32 gets a slot."""
        start = self.offset
        if len(recipes) == 1 and (place := whole_range(recipes)) is not None and place.nbytes:
            crc, slot, nbytes = place.crc32, None if place.crc32 is not None else self._slot(), place.nbytes
            self.add(Copy(place.offset, nbytes, crc, slot, place.member or f"storage {key}"))
            checksum = Checksum(((crc, slot, nbytes),))
            taken_in_part = _taken_in_part(recipes) if crc is None else ()
            record = RecordLayout(key, start, nbytes, checksum, taken_in_part)
            self.records.append(record)
            return record
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
        if self._texts:
            self._end_text()
        return Plan(tuple(self._pieces), self.offset, tuple(self.records))


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
