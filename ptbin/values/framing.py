"""How torch frames one record of a zip archive: local header, padding, descriptor.

A fact of the format, shared by the reader (which predicts and checks it) and the writer (which emits
it). Source: caffe2/serialize/inline_container.cc (`getPadding`) and torch's copy of miniz
(`mz_zip_writer_add_mem_ex_v2`), confirmed on files of torch 2.13 below and above 4 GiB:

* the local header has version 0, flags 0x0808 (descriptor, UTF-8), no time, CRC and sizes zero;
* its extra field is, from 4 GiB on, a zip64 field (sizes if the record is that large, offset if the
  header stands that far), then a field `FB` filled with `Z` so that data begin at a multiple of 64;
* an empty record has flags 0x0800 and no descriptor;
* behind other data a descriptor with signature, CRC-32 and both sizes, 64-bit where a zip64 field stands.

The zip64 field holds the header's own offset, which readers ignore; a record moved elsewhere keeps
the number its source had (`declared_offset`), so that its bytes can be taken as they are.
"""

from __future__ import annotations

import struct

ALIGNMENT = 64  # inline_container.h, kFieldAlignment
_UTF8, _HAS_DESCRIPTOR = 0x0800, 0x0008
ZIP64_THRESHOLD = 0xFFFFFFFF  # MZ_UINT32_MAX: miniz switches at this value, not above it

DESCRIPTOR = struct.Struct("<4sLLL")
DESCRIPTOR_64 = struct.Struct("<4sLQQ")
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # APPNOTE.TXT 4.3.7
ENTRY = struct.Struct("<4s6H3L5H2L")  # of the central directory, 4.3.12
END = struct.Struct("<4s4H2LH")  # 4.3.16
END_64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
LOCATOR_64 = struct.Struct("<4sLQL")  # 4.3.15


def uses_zip64(header_offset: int, nbytes: int) -> bool:
    return header_offset >= ZIP64_THRESHOLD or nbytes >= ZIP64_THRESHOLD


def zip64_field(header_offset: int, nbytes: int) -> bytes:
    """The zip64 extra field torch writes, empty below 4 GiB; the same in local header and directory."""
    body = b""
    if nbytes >= ZIP64_THRESHOLD:
        body += struct.pack("<QQ", nbytes, nbytes)
    if header_offset >= ZIP64_THRESHOLD:
        body += struct.pack("<Q", header_offset)
    return struct.pack("<HH", 1, len(body)) + body if body else b""


def implied_data_offset(header_offset: int, name_nbytes: int, nbytes: int) -> int:
    """Where the data of a record begin whose header stands at `header_offset`."""
    bare = header_offset + LOCAL_HEADER.size + name_nbytes + len(zip64_field(header_offset, nbytes)) + 4
    return -(-bare // ALIGNMENT) * ALIGNMENT


def local_header(
    name: bytes,
    nbytes: int,
    offset: int,
    declared_offset: int | None = None,
    congruent: tuple[int, int] = (0, ALIGNMENT),
) -> bytes:
    """Local header, name, extra field and padding of a record that will stand at `offset`.

    Args:
        congruent: (remainder, modulus) that the offset of the data must have; torch's own is (0, 64).
    """
    zip64 = zip64_field(offset if declared_offset is None else declared_offset, nbytes)
    bare = offset + LOCAL_HEADER.size + len(name) + len(zip64) + 4
    remainder, modulus = congruent
    padding = (remainder - bare) % modulus
    extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return (
        LOCAL_HEADER.pack(b"PK\x03\x04", 0, flags_of(nbytes), 0, 0, 0, 0, 0, 0, len(name), len(extra))
        + name
        + extra
    )


def flags_of(nbytes: int) -> int:
    """General purpose flags of a record of this size, in its local header and in the directory."""
    return _UTF8 | _HAS_DESCRIPTOR if nbytes else _UTF8


def descriptor_nbytes(header_offset: int, nbytes: int) -> int:
    """Size of what stands behind a record whose header stands, or declares to stand, there."""
    if not nbytes:
        return 0
    return (DESCRIPTOR_64 if uses_zip64(header_offset, nbytes) else DESCRIPTOR).size


def descriptor(crc32: int, nbytes: int, *, zip64: bool) -> bytes:
    """What stands behind the data; nothing behind empty data."""
    if not nbytes:
        return b""
    packer = DESCRIPTOR_64 if zip64 else DESCRIPTOR
    return packer.pack(b"PK\x07\x08", crc32, nbytes, nbytes)
