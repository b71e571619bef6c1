"""Format `torch`: the layout of a zip archive that `torch.load(weights_only=True, mmap=True)` reads.

Pure planning. Members: `data.pkl`, `byteorder`, one record per storage, `version`, framed as torch
frames them (`framing`). Where the source is a torch zip, its archive root and storage keys are kept
and records follow in source order, so that a run of neighbours, framing included, is one range of the
source (`splice.coalesce` finds that out). `.format_version` is left out on purpose: with it, torch's
`calculate_storage_offsets` option may compute record positions instead of looking them up
(torch/serialization.py, `_load`), and a checkpoint without its optimizer does not follow that formula.

The bytes are a function of the source's bytes and the options alone.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ptbin.framing import (
    ALIGNMENT,
    ZIP64_THRESHOLD,
    descriptor,
    descriptor_nbytes,
    flags_of,
    local_header,
    uses_zip64,
    zip64_field,
)
from ptbin.segments import Computed, Copy, Late, Literal, Piece, Plan, RecordLayout, Slice
from ptbin.state_dict import StateDict, tensors_of
from ptbin.tensors import ByteRange, TensorRef
from ptbin.writing.pickle_emitter import emit_state_dict
from ptbin.writing.storages import OutputStorage, OutputTensor, plan_storages

__all__ = ["PlannedTensor", "TorchPlan", "plan_torch_archive"]

_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")

# Reading more of a storage than its view, only to confirm the stored CRC-32, may cost this much.
PRECHECK_FLOOR_NBYTES = 512 * 1024
PRECHECK_SHARE = 100

# The first record of a run this long is padded so that all of the run keeps its offsets modulo a page: the
# kernel then copies page by page (a quarter less time, measured), and filesystems that share blocks may.
LONG_RUN_NBYTES = 1 << 20
PAGE_NBYTES = 4096

# torch names the root after the file; nothing longer than a file name is kept.
MAX_ROOT_NBYTES = 255


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One plain tensor of the output.

    `offset` is the first byte it touches in the file; stride in elements, `record` the storage key.
    """

    name: str
    tensor: TensorRef
    placed: OutputTensor
    offset: int


@dataclass(frozen=True, slots=True)
class TorchPlan:
    plan: Plan
    tensors: tuple[PlannedTensor, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the central directory will say of one member."""

    name: bytes
    nbytes: int
    header_offset: int
    crc32: int | None
    slot: int | None


def plan_torch_archive(state_dict: StateDict, *, archive_root: str | None) -> TorchPlan:
    """Lay the output out.

    Args:
        archive_root: the source's archive root where it is a torch zip, else None.
    """
    named = [item for name, value in state_dict.entries for item in tensors_of(name, value)]
    storages, views = plan_storages([t for _, t in named], keep_keys=archive_root is not None)
    keep_root = archive_root is not None and len(archive_root.encode("utf-8", "replace")) <= MAX_ROOT_NBYTES
    root = archive_root if keep_root and archive_root is not None else "archive"
    pickle = emit_state_dict(
        state_dict.entries,
        mapping_kind=state_dict.mapping_kind,
        metadata=state_dict.metadata,
        locate=lambda tensor: views[tensor.layout_key()],
    )
    layout = _Layout(root)
    layout.literal_member("data.pkl", pickle)
    layout.literal_member("byteorder", b"little")
    offsets: dict[int, int] = {}
    prechecks = _prechecks(storages)
    heads = _run_heads(storages)
    for storage in storages:
        offsets[id(storage)] = layout.record(
            storage, checked=_is_checked(storage, prechecks), page_aligned=id(storage) in heads
        )
    layout.literal_member("version", b"3\n")
    layout.directory()
    tensors = []
    for name, tensor in named:
        placed = views[tensor.layout_key()]
        unit = tensor.dtype
        first = placed.storage_offset // unit.per_unit * unit.itemsize
        tensors.append(PlannedTensor(name, tensor, placed, offsets[id(placed.storage)] + first))
    plan = Plan(tuple(layout.pieces), layout.offset, tuple(layout.records), tuple(prechecks))
    return TorchPlan(plan, tuple(tensors))


def _stored(storage: OutputStorage) -> ByteRange | None:
    """Where the source holds the record as a whole, if it does so plainly."""
    place = storage.source.place
    return place if storage.whole and isinstance(place, ByteRange) else None


def _run_heads(storages: list[OutputStorage]) -> set[int]:
    """First records of long runs of neighbours, by identity."""
    runs: list[tuple[int, int]] = []
    end = -1
    for storage in storages:
        place = _stored(storage)
        if place is None or place.record_offset is None:
            end = -1
            continue
        if place.closed and place.record_offset == end:
            runs[-1] = (runs[-1][0], runs[-1][1] + place.nbytes)
        elif place.offset % ALIGNMENT == 0:
            runs.append((id(storage), place.nbytes))
        end = place.offset + place.nbytes + descriptor_nbytes(place.record_offset, place.nbytes)
    return {head for head, nbytes in runs if nbytes >= LONG_RUN_NBYTES}


def _prechecks(storages: list[OutputStorage]) -> list[ByteRange]:
    """Storages viewed in part whose CRC-32 is worth confirming, smallest first, within the allowance."""
    allowance = max(PRECHECK_FLOOR_NBYTES, sum(s.nbytes for s in storages) // PRECHECK_SHARE)
    partial = {
        id(s.source): s.source.place
        for s in storages
        if not s.whole and isinstance(s.source.place, ByteRange) and s.source.place.crc32 is not None
    }
    chosen = []
    for place in sorted(partial.values(), key=lambda p: p.nbytes):
        allowance -= place.nbytes
        if allowance < 0:
            break
        chosen.append(place)
    return chosen


def _is_checked(storage: OutputStorage, prechecks: list[ByteRange]) -> bool:
    place = storage.source.place
    return storage.whole or not isinstance(place, ByteRange) or place.crc32 is None or place in prechecks


class _Layout:
    """The archive as it grows: pieces, current offset, directory entries."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.pieces: list[Piece] = []
        self.offset = 0
        self.entries: list[_Entry] = []
        self.records: list[RecordLayout] = []

    def add(self, piece: Piece) -> None:
        last = self.pieces[-1] if self.pieces else None
        if isinstance(piece, Literal) and isinstance(last, Literal):
            self.pieces[-1] = Literal(last.data + piece.data)
        else:
            self.pieces.append(piece)
        self.offset += piece.nbytes

    def literal_member(self, name: str, data: bytes) -> None:
        raw_name = f"{self.root}/{name}".encode()
        crc = zlib.crc32(data)
        self.entries.append(_Entry(raw_name, len(data), self.offset, crc, None))
        zip64 = uses_zip64(self.offset, len(data))
        self.add(Literal(local_header(raw_name, len(data), self.offset) + data))
        self.add(Literal(descriptor(crc, len(data), zip64=zip64)))

    def record(self, storage: OutputStorage, *, checked: bool, page_aligned: bool) -> int:
        """Add one storage; returns where its data begin.

        `page_aligned` keeps the place within a page that the data have in the source.
        """
        raw_name = f"{self.root}/data/{storage.key}".encode()
        nbytes = storage.nbytes
        stored = _stored(storage)
        # A record whose framing in the source is torch's own keeps the offset that framing declares, so
        # that header, data and descriptor can be taken as one range wherever they come to lie.
        declared = stored.record_offset if stored is not None and stored.closed else None
        header_offset = self.offset
        congruent = (0, ALIGNMENT)
        if page_aligned and stored is not None:
            congruent = (stored.offset % PAGE_NBYTES, PAGE_NBYTES)
        self.add(Literal(local_header(raw_name, nbytes, header_offset, declared, congruent)))
        data_offset = self.offset
        crc = stored.crc32 if stored is not None else None
        slot = None if crc is not None else len(self.records)
        if nbytes:
            self.add(self._body(storage, crc, slot))
        else:
            crc, slot = 0, None
        zip64 = uses_zip64(header_offset if declared is None else declared, nbytes)
        self.entries.append(_Entry(raw_name, nbytes, header_offset, crc, slot))
        if crc is not None:
            self.add(Literal(descriptor(crc, nbytes, zip64=zip64)))
        else:
            assert slot is not None
            self.add(
                Late(len(descriptor(0, nbytes, zip64=zip64)), _late_descriptor(slot, nbytes, zip64=zip64))
            )
        self.records.append(RecordLayout(storage.key, data_offset, nbytes, crc, slot, checked))
        return data_offset

    def _body(self, storage: OutputStorage, crc: int | None, slot: int | None) -> Piece:
        recipe = storage.recipe
        if isinstance(recipe, Slice) and isinstance(recipe.place, ByteRange):
            what = recipe.place.member or f"storage {storage.key}"
            return Copy(recipe.place.offset + recipe.offset, recipe.nbytes, crc, slot, what)
        assert slot is not None
        return Computed(recipe, slot, f"storage {storage.key}")

    def directory(self) -> None:
        start = self.offset
        entries = tuple(self.entries)
        size = sum(_ENTRY.size + len(e.name) + len(zip64_field(e.header_offset, e.nbytes)) for e in entries)

        def build(crcs: Mapping[int, int]) -> bytes:
            return b"".join(_entry(e, e.crc32 if e.slot is None else crcs[e.slot]) for e in entries)

        if all(e.slot is None for e in entries):
            self.add(Literal(build({})))
        else:
            self.add(Late(size, build))
        self.add(Literal(_end_records(len(entries), size, start)))


def _late_descriptor(slot: int, nbytes: int, *, zip64: bool) -> Callable[[Mapping[int, int]], bytes]:
    return lambda crcs: descriptor(crcs[slot], nbytes, zip64=zip64)


def _entry(entry: _Entry, crc32: int | None) -> bytes:
    assert crc32 is not None
    zip64 = zip64_field(entry.header_offset, entry.nbytes)
    size = min(entry.nbytes, ZIP64_THRESHOLD)
    offset = min(entry.header_offset, ZIP64_THRESHOLD)
    head = _ENTRY.pack(
        b"PK\x01\x02",
        0,
        0,
        flags_of(entry.nbytes),
        0,
        0,
        0,
        crc32,
        size,
        size,
        len(entry.name),
        len(zip64),
        0,
        0,
        0,
        0,
        offset,
    )
    return head + entry.name + zip64


def _end_records(count: int, size: int, offset: int) -> bytes:
    """zip64 end record, its locator and the end record; torch writes all three in every archive."""
    version_made, version_needed = 0x031E, 0x002D
    end64 = _END64.pack(
        b"PK\x06\x06", _END64.size - 12, version_made, version_needed, 0, 0, count, count, size, offset
    )
    locator = _LOCATOR64.pack(b"PK\x06\x07", 0, offset + size, 1)
    narrow = min(count, 0xFFFF)
    end = _END.pack(
        b"PK\x05\x06", 0, 0, narrow, narrow, min(size, ZIP64_THRESHOLD), min(offset, ZIP64_THRESHOLD), 0
    )
    return end64 + locator + end
