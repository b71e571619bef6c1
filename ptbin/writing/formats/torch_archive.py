"""Format `torch`: the layout of a zip archive that `torch.load(weights_only=True, mmap=True)` reads.

Pure planning. Members: `data.pkl`, `byteorder`, one record per storage, `version`, framed as torch
frames them (`framing`). Where the source is a torch zip, its archive root and storage keys are kept
and records follow in source order, so that a run of neighbours, framing included, is one range of the
source (`splice.moves` finds that out). `.format_version` is left out on purpose: with it, torch's
`calculate_storage_offsets` option may compute record positions instead of looking them up
(torch/serialization.py, `_load`), and a checkpoint without its optimizer does not follow that formula.

The bytes are a function of the source's bytes and the options alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ptbin.stores.joined import PART_BITS
from ptbin.values.crc32 import crc32_of
from ptbin.values.framing import (
    ALIGNMENT,
    END,
    END_64,
    ENTRY,
    LOCATOR_64,
    ZIP64_THRESHOLD,
    descriptor,
    descriptor_nbytes,
    flags_of,
    local_header,
    uses_zip64,
    zip64_field,
)
from ptbin.values.segments import Checksum, Deferred, FilePlan, Literal, PlannedTensor
from ptbin.values.state_dict import iter_tensors
from ptbin.values.tensors import is_contiguous
from ptbin.writing.layout import FileContent, FileLayout
from ptbin.writing.pickle_emitter import emit_state_dict
from ptbin.writing.storages import OutputStorage, plan_storages

# The first record of a run this long is padded so that all of the run keeps its offsets modulo a page: the
# kernel then copies page by page (a quarter less time, measured), and filesystems that share blocks may.
LONG_RUN_NBYTES = 1 << 20
PAGE_NBYTES = 4096

# torch names the root after the file; nothing longer than a file name is kept.
MAX_ROOT_NBYTES = 255


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the central directory will say of one member."""

    name: bytes
    nbytes: int
    header_offset: int
    checksum: Checksum


def plan_torch_archive(file: FileContent) -> FilePlan:
    """Lay one archive out."""
    named = list(iter_tensors(file.entries))
    root = file.archive_root
    storages, views = plan_storages([t for _, t in named], keep_keys=root is not None, casts=file.casts)
    if root is None or len(root.encode("utf-8", "replace")) > MAX_ROOT_NBYTES:
        root = "archive"
    pickle = emit_state_dict(
        file.entries,
        mapping_kind=file.mapping_kind,
        metadata=file.metadata,
        locate=lambda tensor: views[tensor.layout_key()],
    )
    layout = _Archive(root)
    layout.literal_member("data.pkl", pickle)
    layout.literal_member("byteorder", b"little")
    offsets: dict[int, int] = {}
    heads = _run_heads(storages)
    for storage in storages:
        offsets[id(storage)] = layout.record(storage, page_aligned=id(storage) in heads)
    layout.literal_member("version", b"3\n")
    layout.directory()
    tensors = []
    for label, tensor in named:
        placed = views[tensor.layout_key()]
        first = placed.storage_offset // placed.dtype.per_unit * placed.dtype.itemsize
        tensors.append(
            PlannedTensor(
                label,
                tensor,
                placed.dtype,
                None if is_contiguous(tensor.shape, placed.stride) else placed.stride,
                offsets[id(placed.storage)] + first,
                placed.storage.key,
            )
        )
    return FilePlan(file.name, layout.finish(), tuple(tensors))


def _run_heads(storages: list[OutputStorage]) -> set[int]:
    """First records of long runs of neighbours, by identity."""
    runs: list[tuple[int, int]] = []
    end = -1
    for storage in storages:
        place = storage.stored
        if place is None or place.record_offset is None:
            end = -1
            continue
        if place.closed and place.record_offset == end:
            runs[-1] = (runs[-1][0], runs[-1][1] + place.nbytes)
        elif place.offset % ALIGNMENT == 0:
            runs.append((id(storage), place.nbytes))
        end = place.offset + place.nbytes + descriptor_nbytes(place.record_offset, place.nbytes)
    return {head for head, nbytes in runs if nbytes >= LONG_RUN_NBYTES}


class _Archive(FileLayout):
    """The archive as it grows: what `FileLayout` keeps, and the directory entries."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = root
        self.entries: list[_Entry] = []

    def literal_member(self, name: str, data: bytes) -> None:
        raw_name = f"{self.root}/{name}".encode()
        crc = crc32_of(data)
        self.entries.append(_Entry(raw_name, len(data), self.offset, Checksum(((crc, None, len(data)),))))
        zip64 = uses_zip64(self.offset, len(data))
        self.add(Literal(local_header(raw_name, len(data), self.offset) + data))
        self.add(Literal(descriptor(crc, len(data), zip64=zip64)))

    def add_late(
        self, nbytes: int, build: Callable[[Mapping[int, int]], bytes], *checksums: Checksum
    ) -> None:
        """Add bytes that state checksums, which may not be known yet."""
        known = all(checksum.is_known for checksum in checksums)
        self.add(Literal(build({})) if known else Deferred(nbytes, build))

    def record(self, storage: OutputStorage, *, page_aligned: bool) -> int:
        """Add one storage; returns where its data begin.

        `page_aligned` keeps the place within a page that the data have in the source.
        """
        raw_name = f"{self.root}/data/{storage.key}".encode()
        nbytes = storage.nbytes
        stored = storage.stored
        # A record whose framing in the source is torch's own keeps the offset that framing declares, so
        # that header, data and descriptor can be taken as one range wherever they end up.
        declared = stored.record_offset if stored is not None and stored.closed else None
        if declared is not None:
            declared &= (1 << PART_BITS) - 1
        header_offset = self.offset
        congruent = (0, ALIGNMENT)
        if page_aligned and stored is not None:
            congruent = (stored.offset % PAGE_NBYTES, PAGE_NBYTES)
        self.add(Literal(local_header(raw_name, nbytes, header_offset, declared, congruent)))
        record = self.body(storage.key, storage.recipes)
        zip64 = uses_zip64(header_offset if declared is None else declared, nbytes)
        self.entries.append(_Entry(raw_name, nbytes, header_offset, record.checksum))

        def build(crcs: Mapping[int, int]) -> bytes:
            return descriptor(record.checksum.value(crcs), nbytes, zip64=zip64)

        self.add_late(len(descriptor(0, nbytes, zip64=zip64)), build, record.checksum)
        return record.offset

    def directory(self) -> None:
        start = self.offset
        entries = tuple(self.entries)
        size = sum(ENTRY.size + len(e.name) + len(zip64_field(e.header_offset, e.nbytes)) for e in entries)

        def build(crcs: Mapping[int, int]) -> bytes:
            return b"".join(_entry(e, e.checksum.value(crcs)) for e in entries)

        self.add_late(size, build, *(e.checksum for e in entries))
        self.add(Literal(_end_records(len(entries), size, start)))


def _entry(entry: _Entry, crc32: int) -> bytes:
    zip64 = zip64_field(entry.header_offset, entry.nbytes)
    size = min(entry.nbytes, ZIP64_THRESHOLD)
    offset = min(entry.header_offset, ZIP64_THRESHOLD)
    flags, names = flags_of(entry.nbytes), (len(entry.name), len(zip64))
    head = ENTRY.pack(b"PK\x01\x02", 0, 0, flags, 0, 0, 0, crc32, size, size, *names, 0, 0, 0, 0, offset)
    return head + entry.name + zip64


def _end_records(count: int, size: int, offset: int) -> bytes:
    """zip64 end record, its locator and the end record; torch writes all three in every archive."""
    version_made, version_needed = 0x031E, 0x002D
    end64 = END_64.pack(
        b"PK\x06\x06", END_64.size - 12, version_made, version_needed, 0, 0, count, count, size, offset
    )
    locator = LOCATOR_64.pack(b"PK\x06\x07", 0, offset + size, 1)
    narrow = min(count, 0xFFFF)
    end = END.pack(
        b"PK\x05\x06", 0, 0, narrow, narrow, min(size, ZIP64_THRESHOLD), min(offset, ZIP64_THRESHOLD), 0
    )
    return end64 + locator + end
