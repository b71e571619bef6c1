"""The directory of a zip archive, read strictly.

Implements what torch's archives use of APPNOTE.TXT 6.3: stored and deflated members, data
descriptors, zip64. Everything a scanner and a loader could read differently is refused: encrypted
members, prefixed bytes, names that differ only in case (torch looks them up case-insensitively),
directories that overlap or point outside the file.

Where a stored member's data begin is fixed by its *local* header, which is not in the directory.
torch pads that header so that data begin at a multiple of the alignment (caffe2/serialize/
inline_container.cc, `getPadding`), so the position follows from the directory alone and is confirmed
where data, descriptor and the next header then close without a gap (`Member.closed`). Only members
that do not close cost a read of their local header.

Costs: one read of the last 64 KiB, one more where the directory does not fit into it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from ptbin.errors import CorruptArchiveError, LimitExceededError, NotACheckpointError, UnsupportedFormatError
from ptbin.options import Limits
from ptbin.reading.containers.checkpoint import Opening
from ptbin.reading.containers.source import EDGE_NBYTES, SourceFile
from ptbin.values.crc32 import crc32_of
from ptbin.values.framing import (
    END,
    END_64,
    ENTRY,
    LOCAL_HEADER,
    LOCATOR_64,
    descriptor_nbytes,
    implied_data_offset,
)

STORED, DEFLATED = 0, 8
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_HAS_DESCRIPTOR = 0x8


class Member(NamedTuple):
    """One entry of the directory. Sizes and offsets in bytes."""

    name: str
    raw_name: bytes
    method: int
    flags: int
    crc32: int
    compressed_nbytes: int
    nbytes: int
    header_offset: int
    next_offset: int
    """Where the next local header, or the directory, begins."""
    data_offset: int | None = None
    closed: bool = False


@dataclass(slots=True)
class ZipDirectory:
    """All members, by exact name, in order of their place in the file."""

    file: SourceFile
    members: dict[str, Member]
    directory_offset: int
    crcs_off: bool
    """The writer stored zero for every CRC-32 (`torch.serialization.set_crc32_options(False)`)."""
    limits: Limits

    def crc32_of(self, member: Member) -> int | None:
        return None if self.crcs_off else member.crc32

    def data_offset_of(self, member: Member, *, trusted: bool = True) -> int:
        """Where a member's data begin; reads its local header where the directory leaves that open.

        Args:
            trusted: take what the directory implies (`Member.closed`) for it.

        Raises:
            CorruptArchiveError: header and directory contradict each other, or members overlap.
        """
        if member.data_offset is not None and trusted:
            return member.data_offset
        where = f"{self.file.uri}: member {member.name!r}"
        raw = self.file.read(member.header_offset, LOCAL_HEADER.size, f"local header of {member.name!r}")
        signature, _, flags, method, _, _, crc, csize, usize, n, e = LOCAL_HEADER.unpack(raw)
        if signature != b"PK\x03\x04":
            raise CorruptArchiveError(
                f"{where}: found {signature!r}, expected a local header, at byte {member.header_offset}"
            )
        name = self.file.read(member.header_offset + LOCAL_HEADER.size, n, "member name")
        if name != member.raw_name:
            raise CorruptArchiveError(f"{where}: its local header calls it {name[:80]!r}")
        if method != member.method or flags & _ENCRYPTED:
            raise CorruptArchiveError(f"{where}: local header and directory disagree about method or flags")
        if (
            not flags & _HAS_DESCRIPTOR
            and csize != 0xFFFFFFFF
            and ((crc, csize, usize) != (member.crc32, member.compressed_nbytes, member.nbytes))
        ):
            raise CorruptArchiveError(f"{where}: local header and directory disagree about CRC or sizes")
        data_offset: int = member.header_offset + LOCAL_HEADER.size + n + e
        if data_offset + member.compressed_nbytes > member.next_offset:
            raise CorruptArchiveError(
                f"{where}: {member.compressed_nbytes} bytes at {data_offset} "
                f"reach into what begins at {member.next_offset}"
            )
        self.members[member.name] = member._replace(data_offset=data_offset)
        return data_offset

    def read_member(self, name: str) -> bytes:
        """Content of a small member, inflated, its CRC-32 checked.

        Raises:
            CorruptArchiveError: no such member, or damaged.
            LimitExceededError: larger than the limits allow.
        """
        member = self.members.get(name)
        if member is None:
            raise CorruptArchiveError(f"{self.file.uri}: no member {name!r}")
        limit = "pickle_nbytes" if member.method == STORED else "inflated_member_nbytes"
        if member.nbytes > (most := getattr(self.limits, limit)):
            raise LimitExceededError(
                f"{self.file.uri}: member {name!r} has {member.nbytes} bytes, the limit is {most}",
                limit=limit,
            )
        if member.method == DEFLATED and member.nbytes > (
            self.limits.pickle_inflate_ratio * member.compressed_nbytes + (1 << 20)
        ):
            raise LimitExceededError(
                f"{self.file.uri}: member {name!r} claims to inflate "
                f"from {member.compressed_nbytes} to {member.nbytes} bytes",
                limit="pickle_inflate_ratio",
            )
        # Index members are few, their headers next to them: no trust in the implied place here, where a
        # loader that follows the local header would read another pickle.
        offset = self.data_offset_of(member, trusted=False)
        raw = self.file.read(offset, member.compressed_nbytes, f"member {name!r}")
        if member.method == DEFLATED:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                raw = inflater.decompress(raw, member.nbytes + 1)
            except zlib.error as error:
                raise CorruptArchiveError(
                    f"{self.file.uri}: member {name!r} does not inflate: {error}"
                ) from error
        if len(raw) != member.nbytes:
            raise CorruptArchiveError(
                f"{self.file.uri}: member {name!r} has {len(raw)} bytes, {member.nbytes} are stated"
            )
        if not self.crcs_off and crc32_of(raw) != member.crc32:
            raise CorruptArchiveError(
                f"{self.file.uri}: member {name!r} has CRC-32 "
                f"{crc32_of(raw):08x}, the directory states {member.crc32:08x}"
            )
        return raw


def refuse_prefixed_zip(opening: Opening) -> None:
    """Say so where a file that begins as nothing else ends as a zip archive.

    Raises:
        CorruptArchiveError: bytes before its first member. NotACheckpointError: an archive without members.
    """
    file = opening.file
    _, tail = file.tail(EDGE_NBYTES + END.size)
    if b"PK\x05\x06" not in tail:
        return
    if file.head(4) == b"PK\x05\x06":
        raise NotACheckpointError(f"{file.uri}: a zip archive without members")
    read_zip_directory(file, opening.limits)


def read_zip_directory(file: SourceFile, limits: Limits) -> ZipDirectory:
    """The directory of a file that is a zip archive.

    Raises:
        CorruptArchiveError: its directory is missing or contradicts itself.
        UnsupportedFormatError: encrypted members, several disks, other compression methods.
        LimitExceededError: more members or a larger directory than the limits allow.
    """
    tail_offset, tail = file.tail(EDGE_NBYTES + END.size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(tail):
        raise CorruptArchiveError(f"{file.uri}: a zip archive without its directory; is it truncated?")
    end_offset = tail_offset + at
    count, size, offset, directory_end = _read_end_records(file, tail, at, end_offset)
    if count > limits.members or size > limits.directory_nbytes:
        limit = "members" if count > limits.members else "directory_nbytes"
        raise LimitExceededError(f"{file.uri}: a directory of {count} members and {size} bytes", limit=limit)
    if offset + size != directory_end:
        raise CorruptArchiveError(
            f"{file.uri}: the directory should end at byte "
            f"{offset + size}, its end record stands at {directory_end}"
        )
    raw = file.read(offset, size, "zip directory")
    members = _parse_entries(file.uri, raw, count, offset)
    if file.head(4) != b"PK\x03\x04" or (members and members[0].header_offset != 0):
        raise CorruptArchiveError(
            f"{file.uri}: bytes before the first member; torch refuses such an archive as well"
        )
    crcs_off = any(m.nbytes for m in members) and all(m.crc32 == 0 for m in members)
    return ZipDirectory(file, {m.name: m for m in members}, offset, crcs_off, limits)


def _read_end_records(file: SourceFile, tail: bytes, at: int, end_offset: int) -> tuple[int, int, int, int]:
    """Number of entries, directory size and offset, and where the directory must end."""
    _, disk, start_disk, here, count, size, offset, _ = END.unpack_from(tail, at)
    directory_end = end_offset
    locator_at = end_offset - LOCATOR_64.size
    has_locator = locator_at >= 0 and file.read(locator_at, 4) == b"PK\x06\x07"
    if has_locator:
        _, _, end64_offset, disks = LOCATOR_64.unpack(file.read(locator_at, LOCATOR_64.size))
        raw = file.read(end64_offset, END_64.size, "zip64 end record")
        signature, length, _, _, disk64, start64, here64, count64, size64, offset64 = END_64.unpack(raw)
        if signature != b"PK\x06\x06" or disks > 1 or end64_offset + 12 + length != locator_at:
            raise CorruptArchiveError(f"{file.uri}: damaged zip64 end record at byte {end64_offset}")
        for name, narrow, wide, mask in (
            ("entries", count, count64, 0xFFFF),
            ("size", size, size64, 0xFFFFFFFF),
            ("offset", offset, offset64, 0xFFFFFFFF),
        ):
            if narrow not in (mask, wide):
                raise CorruptArchiveError(f"{file.uri}: the end records state {name} {narrow} and {wide}")
        disk, start_disk, here, count, size, offset = disk64, start64, here64, count64, size64, offset64
        directory_end = end64_offset
    if disk or start_disk or here != count:
        raise UnsupportedFormatError(f"{file.uri}: a zip archive over several disks")
    return count, size, offset, directory_end


def _parse_entries(uri: str, raw: bytes, count: int, directory_offset: int) -> list[Member]:
    found: list[Member] = []
    names: dict[str, str] = {}
    pos = 0
    for index in range(count):
        if pos + ENTRY.size > len(raw) or raw[pos : pos + 4] != b"PK\x01\x02":
            raise CorruptArchiveError(f"{uri}: the directory breaks off at entry {index} of {count}")
        (_, _, _, flags, method, _, _, crc, csize, usize, n, e, c, disk, _, _, offset) = ENTRY.unpack_from(
            raw, pos
        )
        body = pos + ENTRY.size
        raw_name, extra = raw[body : body + n], raw[body + n : body + n + e]
        pos = body + n + e + c
        if pos > len(raw) or not raw_name:
            raise CorruptArchiveError(f"{uri}: the directory breaks off at entry {index} of {count}")
        try:
            name = raw_name.decode("utf-8")
        except UnicodeDecodeError:
            name = raw_name.decode("cp437")
        usize, csize, offset = _zip64_values(uri, name, extra, usize, csize, offset)
        if flags & _ENCRYPTED:
            raise UnsupportedFormatError(f"{uri}: member {name!r} is encrypted; decrypt the archive first")
        if method not in (STORED, DEFLATED):
            raise UnsupportedFormatError(f"{uri}: member {name!r} has compression method {method}")
        if method == STORED and csize != usize:
            raise CorruptArchiveError(f"{uri}: stored member {name!r} of {csize} and of {usize} bytes")
        if disk not in (0, 0xFFFF) or offset + 30 + n + csize > directory_offset:
            raise CorruptArchiveError(f"{uri}: member {name!r} reaches beyond the directory's begin")
        twin = names.setdefault(name.casefold(), name)
        if twin is not name:
            raise CorruptArchiveError(f"{uri}: members {twin!r} and {name!r} are one name to torch")
        found.append(Member(name, raw_name, method, flags, crc, csize, usize, offset, 0))
    if pos != len(raw):
        raise CorruptArchiveError(
            f"{uri}: {len(raw) - pos} bytes in the directory behind its {count} entries"
        )
    return _place(uri, found, directory_offset)


def _zip64_values(
    uri: str, name: str, extra: bytes, usize: int, csize: int, offset: int
) -> tuple[int, int, int]:
    """Sizes and offset with the zip64 extra field applied (APPNOTE.TXT 4.5.3)."""
    if 0xFFFFFFFF not in (usize, csize, offset):
        return usize, csize, offset
    pos = 0
    values = [usize, csize, offset]
    while pos + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, pos)
        field_end = pos + 4 + length
        if field_end > len(extra):
            break
        if tag == 1:
            at = pos + 4
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    if at + 8 > field_end:
                        raise CorruptArchiveError(f"{uri}: member {name!r} has a short zip64 field")
                    (values[index],) = struct.unpack_from("<Q", extra, at)
                    at += 8
        pos = field_end
    return values[0], values[1], values[2]


def _place(uri: str, found: list[Member], directory_offset: int) -> list[Member]:
    """Members in file order, each with its successor; overlaps are refused."""
    ordered = sorted(found, key=lambda m: m.header_offset)
    placed: list[Member] = []
    for index, member in enumerate(ordered):
        following = ordered[index + 1].header_offset if index + 1 < len(ordered) else directory_offset
        if member.header_offset + 30 + len(member.raw_name) + member.compressed_nbytes > following:
            raise CorruptArchiveError(
                f"{uri}: member {member.name!r} overlaps what begins at byte {following}"
            )
        data_offset = _closing_offset(member, following)
        placed.append(Member(*member[:8], following, data_offset, data_offset is not None))
    return placed


def _closing_offset(member: Member, following: int) -> int | None:
    """Where the data begin, if the layout of torch's writer then closes without a gap."""
    if member.method != STORED or bool(member.flags & _HAS_DESCRIPTOR) != bool(member.nbytes):
        return None
    data_offset = implied_data_offset(member.header_offset, len(member.raw_name), member.nbytes)
    end = data_offset + member.nbytes + descriptor_nbytes(member.header_offset, member.nbytes)
    return data_offset if end == following else None


def refuse_foreign_zip(directory: ZipDirectory) -> None:
    """A zip archive that holds no torch pickle and no checkpoint: say what it seems to be."""
    names = list(directory.members)
    uri = directory.file.uri
    if any(name.endswith("/model.json") or name == "model.json" for name in names):
        raise UnsupportedFormatError(
            f"{uri}: a TorchScript archive of before 1.0 "
            "(model.json); load and save it again with a newer torch"
        )
    if any(
        name.rsplit("/", 1)[-1] == "archive_format" or name.endswith("models/model.json") for name in names
    ):
        raise UnsupportedFormatError(
            f"{uri}: a torch.export archive (.pt2) without weights that ptbin reads: one of before torch "
            "2.8, or compiled code; load it and save its state_dict with torch.save"
        )
    raise NotACheckpointError(
        f"{uri}: a zip archive without a data.pkl, and without a checkpoint ({', '.join(names[:3])})"
    )
