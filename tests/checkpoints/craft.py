"""Files put together by hand: zip archives with every field free, and pickles opcode by opcode.

Owns what no honest writer does. The zip layout is APPNOTE.TXT 6.3.10 (sections 4.3.7, 4.3.9, 4.3.12 to
4.3.16); the pickle opcodes are CPython's Lib/pickletools.py. Writing goes through plain files, so that
a member of gigabytes can be a hole.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

__all__ = [
    "Member",
    "TorchPickle",
    "change",
    "integer",
    "ints",
    "legacy_file",
    "named",
    "read_members",
    "text",
    "torch_members",
    "write_zip",
]


@dataclass(frozen=True)
class Member:
    """One member of an archive. What is None is computed truthfully."""

    name: str
    data: bytes = b""
    deflate: bool = False
    flags: int = 0
    crc32: int | None = None
    size: int | None = None
    """Uncompressed size as the headers claim it."""
    local_name: str | None = None
    hole_nbytes: int = 0
    """Zero bytes after `data`, written as a hole."""
    align: int = 64
    zip64: bool = False
    local_extra: bytes = field(default=b"", repr=False)


def _crc_of_zeros(crc: int, nbytes: int) -> int:
    block = bytes(1 << 24)
    while nbytes >= len(block):
        crc = zlib.crc32(block, crc)
        nbytes -= len(block)
    return zlib.crc32(block[:nbytes], crc)


def write_zip(
    path: Path, members: Iterable[Member], *, zip64: bool = False, comment: bytes = b"", tail: bytes = b""
) -> Path:
    """Write the members in order, each with its data at a multiple of `align` (padding as torch pads)."""
    directory: list[bytes] = []
    with path.open("wb") as file:
        for member in members:
            offset = file.tell()
            packed = member.data
            if member.deflate:
                deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
                packed = deflater.compress(member.data) + deflater.flush()
            size = member.size if member.size is not None else len(member.data) + member.hole_nbytes
            stored = len(packed) + member.hole_nbytes if member.deflate or member.size is None else size
            crc = member.crc32
            if crc is None:
                crc = _crc_of_zeros(zlib.crc32(member.data), member.hole_nbytes)
            big = zip64 or member.zip64 or size > 0xFFFFFFFE
            wide = struct.pack("<HHQQ", 1, 16, size, stored) if big else b""
            small = (0xFFFFFFFF, 0xFFFFFFFF) if big else (stored, size)
            method = 8 if member.deflate else 0
            name = member.name.encode()
            local_name = name if member.local_name is None else member.local_name.encode()
            extra = wide + member.local_extra
            start = offset + 30 + len(local_name) + len(extra) + 4
            gap = -start % member.align if member.align > 1 else 0
            if member.align > 1:
                # caffe2/serialize/inline_container.cc, getPadding(): extra field "FB", padded with "Z"
                extra += struct.pack("<2sH", b"FB", gap) + b"Z" * gap
            fields = (member.flags, method, 0, 0, crc, *small)
            file.write(b"PK\3\4" + struct.pack("<HHHHHLLLHH", 45, *fields, len(local_name), len(extra)))
            file.write(local_name + extra + packed)
            if member.hole_nbytes:
                file.truncate(file.tell() + member.hole_nbytes)
                file.seek(0, 2)
            far = zip64 or offset > 0xFFFFFFFE
            central = b""
            if big or far:
                body = (struct.pack("<QQ", size, stored) if big else b"") + (
                    struct.pack("<Q", offset) if far else b""
                )
                central = struct.pack("<HH", 1, len(body)) + body
            directory.append(
                b"PK\1\2"
                + struct.pack("<HHHHHHLLL", 45, 45, *fields)
                + struct.pack("<HHHHHLL", len(name), len(central), 0, 0, 0, 0, 0xFFFFFFFF if far else offset)
                + name
                + central
            )
        at = file.tell()
        blob = b"".join(directory)
        file.write(blob)
        count = len(directory)
        if zip64 or at > 0xFFFFFFFE or count > 0xFFFE:
            end64 = file.tell()
            file.write(struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(blob), at))
            file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end64, 1))
            end = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        else:
            end = (count, count, len(blob), at)
        file.write(struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, *end, len(comment)) + comment + tail)
    return path


def read_members(path: Path) -> list[Member]:
    """The members of an honest archive, in order, to be changed and written again."""
    with zipfile.ZipFile(path) as archive:
        return [
            Member(info.filename, archive.read(info), align=64 if "/data/" in info.filename else 1)
            for info in archive.infolist()
        ]


def torch_members(
    data_pkl: bytes,
    storages: Sequence[bytes] = (),
    *,
    root: str = "archive",
    byteorder: str = "little",
) -> list[Member]:
    """The members that torch.save writes (torch 2.13), around any pickle."""
    return [
        Member(f"{root}/data.pkl", data_pkl),
        Member(f"{root}/byteorder", byteorder.encode()),
        *(Member(f"{root}/data/{key}", data) for key, data in enumerate(storages)),
        Member(f"{root}/version", b"3\n"),
    ]


def change(members: Iterable[Member], ending: str, **changes: object) -> list[Member]:
    """The same members, those whose name ends so with other fields."""
    return [
        replace(member, **changes) if member.name.endswith(ending) else member  # type: ignore[arg-type]
        for member in members
    ]


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<L", len(raw)) + raw


def integer(value: int) -> bytes:
    """BININT where it fits, LONG1 where not."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<l", value)
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(integer(value) for value in values) + b"t"


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


class TorchPickle:
    """Pickles of state dicts as torch lays them out, with numbers that torch would not write.

    `tensor()` gives the opcodes of one float32 tensor; `state_dict()` those of a dict around them.
    Reference: torch/serialization.py `_save.persistent_id`, torch/_utils.py `_rebuild_tensor_v2`.
    """

    @staticmethod
    def storage(
        key: str, elements: int, kind: str = "FloatStorage", location: str = "cpu", *, legacy: bool = False
    ) -> bytes:
        tag = text("storage") + named("torch", kind) + text(key) + text(location) + integer(elements)
        return b"(" + tag + (b"N" if legacy else b"") + b"tQ"

    @classmethod
    def tensor(
        cls,
        key: str = "0",
        *,
        elements: int,
        shape: Sequence[int],
        stride: Sequence[int],
        storage_offset: int = 0,
        kind: str = "FloatStorage",
        legacy: bool = False,
    ) -> bytes:
        storage = cls.storage(key, elements, kind, legacy=legacy)
        arguments = storage + integer(storage_offset) + ints(shape) + ints(stride)
        hooks = named("collections", "OrderedDict") + b")R"
        return named("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"\x89" + hooks + b"tR"

    @staticmethod
    def state_dict(entries: dict[str, bytes], *, before: bytes = b"", protocol: int = 2) -> bytes:
        """`before` are opcodes that leave the stack as they found it."""
        body = b"".join(text(name) + value for name, value in entries.items())
        return b"\x80" + bytes([protocol]) + before + b"}(" + body + b"u."


def legacy_file(
    data: bytes, storages: Sequence[bytes], *, before: Mapping[str, bytes] | None = None
) -> bytes:
    """A legacy file (torch/serialization.py `_legacy_save`) of float32 storages with keys 0, 1, ...

    `before` puts opcodes in front of one of its pickles: `magic_number`, `protocol_version`, `sys_info`
    or `storage_keys`.
    """
    extra = before or {}

    def dumped(name: str, value: object) -> bytes:
        raw = pickle.dumps(value, protocol=2)
        return raw[:2] + extra.get(name, b"") + raw[2:]

    sizes = {"short": 2, "int": 4, "long": 4}
    head = dumped("magic_number", 0x1950A86A20F9469CFC6C) + dumped("protocol_version", 1001)
    system = dumped("sys_info", {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes})
    keys = dumped("storage_keys", [str(key) for key in range(len(storages))])
    return head + system + data + keys + b"".join(struct.pack("<q", len(raw) // 4) + raw for raw in storages)
