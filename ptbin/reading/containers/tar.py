"""The members of a plain tar archive, and where their bytes lie. Nothing is unpacked.

Reads what writers of checkpoints write: V7, ustar, GNU (long names, sizes above 8 GiB) and PAX headers.
Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar's manual, "Basic Tar
Format"; CPython, Lib/tarfile.py, for what is read where they leave room.

A tar has no directory: it is walked from header to header. Costs: one request of 16 KiB for each member
that is larger than that, with which the member's first bytes come along; small ones share a request. The
walk ends after `MAX_INDEX_READS` requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ptbin.errors import CorruptArchiveError, LimitExceededError, UnsupportedFormatError
from ptbin.reading.containers.source import SourceFile

BLOCK_NBYTES = 512
WINDOW_NBYTES = 16 * 1024
MAX_INDEX_READS = 1000
"""Requests for headers in one archive: some 20 s of a distant store."""

MAX_MEMBERS = 100_000
MAX_EXTENSION_NBYTES = 1 << 20  # one PAX header or long name; real ones have some hundred bytes
MAX_NAME_CHARS = 4096
MAX_PADDING_NBYTES = 1 << 20  # tar fills its last record, of 10 KiB unless it was told otherwise

# The header's fields (POSIX.1-2017, pax, table 4-14): name, size, checksum, typeflag, magic, prefix.
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
_TYPE, _MAGIC, _PREFIX = slice(156, 157), slice(257, 263), slice(345, 500)

_LONG_NAME, _LONG_LINK, _PAX_GLOBAL = b"L", b"K", b"g"
_PAX = (b"x", b"X")  # the second is Solaris's
_WITHOUT_DATA = frozenset([b"1", b"2", b"3", b"4", b"5", b"6", b"V"])  # links, devices, folders, a label
_SPARSE, _CONTINUED = b"S", b"M"


@dataclass(frozen=True, slots=True)
class TarMember:
    """One file in the archive. `name` is text and never a path; `offset` is where its bytes begin."""

    name: str
    offset: int
    nbytes: int


def looks_like_tar(head: bytes) -> bool:
    """Whether the first block is a tar header: its checksum holds."""
    return len(head) >= BLOCK_NBYTES and head[:1] != b"\0" and _checksum_holds(head[:BLOCK_NBYTES])


def iter_tar(file: SourceFile) -> Iterator[TarMember]:
    """Every regular file in the archive, in order. A member is yielded before its end is known to be there.

    Raises:
        CorruptArchiveError: a header is missing, or a member reaches beyond the file.
        UnsupportedFormatError: a sparse member, or one that continues in another volume.
        LimitExceededError: more members or longer names than any checkpoint has.
    """
    count = 0
    everywhere: dict[str, str] = {}
    attributes: dict[str, str] = {}
    long_name: str | None = None
    pos = 0
    while pos < file.size:
        header = file.read_ahead(pos, BLOCK_NBYTES, WINDOW_NBYTES, "tar header")
        if not any(header):
            _refuse_more(file, pos)
            break
        if file.reads_ahead > MAX_INDEX_READS or count > MAX_MEMBERS:
            raise LimitExceededError(
                f"{file.uri}: a tar archive of more than {count} members; "
                "unpack it and convert its checkpoints"
            )
        if not _checksum_holds(header):
            raise CorruptArchiveError(f"{file.uri}: no tar header at byte {pos}, where the last member ends")
        kind = header[_TYPE]
        nbytes = _number(file, header[_SIZE], pos)
        data_offset = pos + BLOCK_NBYTES
        if kind in (_LONG_NAME, _LONG_LINK, *_PAX, _PAX_GLOBAL):
            text = _extension(file, data_offset, nbytes)
            if kind == _LONG_NAME:
                long_name = _decode(text.rstrip(b"\0"))
            elif kind in _PAX:
                attributes = _parse_pax(file, text, pos)
            elif kind == _PAX_GLOBAL:
                everywhere.update(_parse_pax(file, text, pos))
            pos = _end(file, data_offset, nbytes, "a header")
            continue
        values = {**everywhere, **attributes}
        name = values.get("path") or long_name or _name(header)
        if len(name) > MAX_NAME_CHARS:
            raise LimitExceededError(f"{file.uri}: a member name of {len(name)} characters")
        if kind in _WITHOUT_DATA:
            nbytes = 0
        else:
            if kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in values):
                raise UnsupportedFormatError(
                    f"{file.uri}: member {name[:200]!r} is stored as a sparse file; "
                    "unpack the archive with `tar -xf` and convert that"
                )
            if kind == _CONTINUED:
                raise UnsupportedFormatError(
                    f"{file.uri}: a volume of a larger tar archive; unpack it with tar -M"
                )
            nbytes = _pax_size(file, values, nbytes, pos)
        if kind not in _WITHOUT_DATA and not name.endswith("/"):
            count += 1
            yield TarMember(_plain(name), data_offset, nbytes)
        pos = _end(file, data_offset, nbytes, f"member {name[:200]!r}")
        attributes, long_name = {}, None


def _refuse_more(file: SourceFile, pos: int) -> None:
    """Refuse what stands behind the end of the archive: weights there would be lost without a word."""
    nbytes = min(file.size - pos, MAX_PADDING_NBYTES)
    if file.size - pos > nbytes or any(file.read_ahead(pos, nbytes, WINDOW_NBYTES, "padding")):
        raise UnsupportedFormatError(
            f"{file.uri}: the tar archive ends at byte {pos}, and more follows it; unpack it with `tar -xif`"
        )


def _plain(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _end(file: SourceFile, data_offset: int, nbytes: int, what: str) -> int:
    """Where the next header stands: members are padded to whole blocks."""
    if data_offset + nbytes > file.size:
        raise CorruptArchiveError(
            f"{file.uri}: {what} should have {nbytes} bytes from {data_offset} on, "
            f"the file has {file.size}; is it truncated?"
        )
    return data_offset + -(-nbytes // BLOCK_NBYTES) * BLOCK_NBYTES


def _checksum_holds(header: bytes) -> bool:
    """The sum of the header's bytes, its own field taken as blanks; old writers summed signed bytes."""
    if len(header) < BLOCK_NBYTES:
        return False
    try:
        stated = int(header[_CHECKSUM].split(b"\0", 1)[0].strip() or b"x", 8)
    except ValueError:
        return False
    blanked = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(blanked)
    return stated in (unsigned, unsigned - 256 * sum(byte > 127 for byte in blanked))


def _number(file: SourceFile, raw: bytes, pos: int) -> int:
    """A size: octal digits, or GNU's base-256 with the first bit set."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    try:
        value = int(raw.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise CorruptArchiveError(f"{file.uri}: a size of {raw!r} in the tar header at byte {pos}")
    return value


def _name(header: bytes) -> str:
    name = header[_NAME].split(b"\0", 1)[0]
    if header[_MAGIC] == b"ustar\0":  # GNU's own headers keep times where ustar has the prefix
        prefix = header[_PREFIX].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return _decode(name)


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _extension(file: SourceFile, offset: int, nbytes: int) -> bytes:
    if nbytes > MAX_EXTENSION_NBYTES:
        raise LimitExceededError(f"{file.uri}: a tar header of {nbytes} bytes at byte {offset}")
    return file.read_ahead(offset, nbytes, WINDOW_NBYTES, "tar header")


def _parse_pax(file: SourceFile, text: bytes, pos: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE` and a line break, the length counting the whole record."""
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        digits, _, _ = text[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = text[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if length <= len(digits) + 2 or len(record) != length or record[-1:] != b"\n" or not equals:
            raise CorruptArchiveError(f"{file.uri}: a damaged PAX header at byte {pos}")
        found[_decode(key)] = _decode(value)
        at += length
    return found


def _pax_size(file: SourceFile, values: dict[str, str], nbytes: int, pos: int) -> int:
    if "size" not in values:
        return nbytes
    text = values["size"]
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise CorruptArchiveError(f"{file.uri}: a size of {text[:40]!r} in the PAX header before byte {pos}")
    return int(text)
