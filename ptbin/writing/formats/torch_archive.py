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

import functools
import struct
from collections.abc import Callable, Mapping

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
from ptbin.values.segments import Checksum, Deferred, FilePlan, PlannedTensor, Stated
from ptbin.values.state_dict import iter_tensors
from ptbin.values.tensors import is_contiguous
from ptbin.writing.layout import FileContent, FileLayout
from ptbin.writing.pickle_emitter import emit_state_dict
from ptbin.writing.storages import OutputStorage, plan_storages

# The first record of a run this long is padded so that all of the run keeps its offsets modulo a page: the
# kernel then copies page by page (a quarter less time, measured), and filesystems that share blocks may.
LONG_RUN_NBYTES = 1 << 20
PAGE_NBYTES = 4096

CRC32_FIELD = struct.Struct("<L")
CRC32_AT = 16
"""In an entry of the central directory (APPNOTE.TXT 4.3.12)."""

# torch names the root after the file; nothing longer than a file name is kept.
MAX_ROOT_NBYTES = 255


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
        locate=lambda tensor: views[id(tensor)],
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
        placed = views[id(tensor)]
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
    """The archive as it grows: what `FileLayout` keeps, and its directory, the CRC-32s of which come last."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = root
        self._directory = bytearray()
        self._members: list[tuple[int, Checksum]] = []
        """Of each entry of the directory, where it begins, and the CRC-32 that it states."""

    def _add_entry(self, name: bytes, nbytes: int, header_offset: int, checksum: Checksum) -> None:
        self._members.append((len(self._directory), checksum))
        self._directory += _entry(name, nbytes, header_offset)

    def literal_member(self, name: str, data: bytes) -> None:
        raw_name = f"{self.root}/{name}".encode()
        crc = crc32_of(data)
        self._add_entry(raw_name, len(data), self.offset, Checksum(((crc, None, len(data)),)))
        zip64 = uses_zip64(self.offset, len(data))
        self.text(local_header(raw_name, len(data), self.offset) + data)
        self.text(descriptor(crc, len(data), zip64=zip64))

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
        self.text(local_header(raw_name, nbytes, header_offset, declared, congruent))
        record = self.body(storage.key, storage.recipes)
        checksum = record.checksum
        self._add_entry(raw_name, nbytes, header_offset, checksum)
        if nbytes:
            zip64 = uses_zip64(header_offset if declared is None else declared, nbytes)
            if checksum.is_known:
                self.text(descriptor(checksum.value({}), nbytes, zip64=zip64))
            else:
                late = _descriptor_of(nbytes, zip64)
                self.add(Stated(len(late(0)), checksum, late))
        return record.offset

    def directory(self) -> None:
        # Not `self`: a plan that refers to itself would stay in memory until the collector comes by.
        start, directory, members = self.offset, self._directory, self._members

        def build(crcs: Mapping[int, int]) -> bytes:
            for position, checksum in members:
                CRC32_FIELD.pack_into(directory, position + CRC32_AT, checksum.value(crcs))
            return bytes(directory)

        if all(checksum.is_known for _, checksum in members):
            self.text(build({}))
        else:
            self.add(Deferred(len(directory), build))
        self.text(_end_records(len(members), len(directory), start))


@functools.lru_cache(4096)
def _descriptor_of(nbytes: int, zip64: bool) -> Callable[[int], bytes]:
    """The descriptor of a record of this size, by its CRC-32."""
    return functools.partial(descriptor, nbytes=nbytes, zip64=zip64)


def _entry(name: bytes, nbytes: int, header_offset: int) -> bytes:
    """What the central directory says of one member; its CRC-32 is still zero."""
    zip64 = zip64_field(header_offset, nbytes)
    size = min(nbytes, ZIP64_THRESHOLD)
    offset = min(header_offset, ZIP64_THRESHOLD)
    flags, names = flags_of(nbytes), (len(name), len(zip64))
    head = ENTRY.pack(b"PK\x01\x02", 0, 0, flags, 0, 0, 0, 0, size, size, *names, 0, 0, 0, 0, offset)
    return head + name + zip64


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
