"""Whole files from one store to another as they are, by the cheapest means the two have.

Inside one store it copies by itself, between local files the kernel does, everything else is streamed. The
source is pinned: what arrives is one state of it, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ptbin.errors import NotFoundInStoreError, OutputExistsError, VerificationError
from ptbin.stores import CopyRefused, Identity, Place, RangeReader, Writer, identity_text
from ptbin.stores.parts import Extent, Part
from ptbin.values.crc32 import crc32_of

Progress = Callable[[int], None]
Change = Callable[[bytes], bytes]
CHUNK_NBYTES = 1 << 20
SMALL_NBYTES = 256 * 1024
MAX_CHANGED_NBYTES = 16 << 20
FORCE = "move it away, choose another DEST, or replace it with --force"


@dataclass(frozen=True, slots=True)
class Copied:
    """Size in bytes, how many of them a store copied by itself, what is stored now.

    `changed`: not what the source holds, but what `change` made of it.
    """

    size: int
    copied_nbytes: int
    identity: Identity
    changed: bool = False


def copy_file(
    source: Place,
    dest: Place,
    *,
    expected: Identity | None = None,
    verify: bool = True,
    change: Change | None = None,
    progress: Progress | None = None,
    may_replace: Callable[[str], bool] | None = None,
    advice: str = FORCE,
) -> Copied:
    """Copy a file, whole or not at all.

    Args:
        change: makes of a small file's content what is to be stored instead (`sidecars.change_of`).
        expected: the state of the source that was seen; another one is an error.
        may_replace: asked whether the file at `dest` may be replaced, by its identity as a text; one that
            holds the same bytes stays in any case. None: whatever is there is replaced.
        advice: what to do about a file that may not be, for the message.
        verify: read what was streamed back and compare, unless the store answered with the MD5 of what it
            got; a store's own copies are compared by their size.

    Raises:
        OutputExistsError: another file is there.
        SourceChangedError, StorageError: from the stores. VerificationError: it arrived otherwise; removed.
    """
    if may_replace is not None:
        same = find_in_place(source, dest, may_replace, change=change, progress=progress, advice=advice)
        if same is not None:
            return same
    with source.open_reader(expected=expected) as reader:
        changed = False
        if change is not None and reader.size <= MAX_CHANGED_NBYTES:
            content = reader.read(0, reader.size)
            wanted = change(content)
            changed = wanted != content
        if changed:
            reader.check_unchanged()
            with dest.open_writer(size_hint=len(wanted)) as sent:
                sent.write(wanted)
                sent.commit()
            crc32: int | None = crc32_of(wanted)
        else:
            try:
                sent, crc32 = _write(reader, dest, progress, copies=True)
            except CopyRefused:
                sent, crc32 = _write(reader, dest, progress, copies=False)
    if verify and not sent.acknowledged and not _arrived(dest, sent.bytes_written, crc32, progress):
        dest.delete()
        raise VerificationError(f"{dest.uri}: not what was written; removed")
    return Copied(sent.bytes_written, sent.bytes_copied, sent.identity or dest.stat().identity, changed)


def find_in_place(
    source: Place,
    dest: Place,
    may_replace: Callable[[str], bool],
    *,
    change: Change | None = None,
    progress: Progress | None = None,
    advice: str = FORCE,
) -> Copied | None:
    """What is at DEST already, where it is the same as SOURCE; None where it is to be written.

    Raises:
        OutputExistsError: another file is there that may not be replaced.
    """
    try:
        there = dest.stat()
    except NotFoundInStoreError:
        return None
    if may_replace(identity_text(there.identity)):
        return None
    same = same_content(source, dest, change=change, progress=progress)
    if same is None:
        raise OutputExistsError(
            f"{dest.uri}: a file of {there.size} bytes is there that ptbin did not copy; {advice}"
        )
    return same


def _write(
    reader: RangeReader, dest: Place, progress: Progress | None, *, copies: bool
) -> tuple[Writer, int | None]:
    """The writer, which has committed, and the CRC-32 of what came through here; None where not all did."""
    with dest.open_writer(size_hint=reader.size, copies=copies) as writer:
        parts = [Part(0, reader.size, False)]
        if copies and reader.size and writer.moves_from(reader):
            parts = writer.lay_out([Extent(reader.size, True)]) or parts
        crc32: int | None = 0
        for part in parts:
            if part.copied and writer.copy_from(reader, part.start, part.nbytes):
                crc32 = None  # of a whole that was not seen
                if progress is not None:
                    progress(part.nbytes)
                continue
            for piece in reader.iter_range(part.start, part.nbytes):
                crc32 = crc32_of(piece, crc32) if crc32 is not None else None
                writer.write(piece)
                if progress is not None:
                    progress(len(piece))
        writer.settle()
        reader.confirm()
        writer.commit()
        return writer, crc32


def _arrived(dest: Place, size: int, crc32: int | None, progress: Progress | None) -> bool:
    if crc32 is None:
        return dest.stat().size == size
    # To ask for a checksum takes as long as to read a small file.
    stated = dest.store.crc32_of(dest.path) if size > SMALL_NBYTES else None
    if stated is not None:
        return stated == crc32
    found = 0
    with dest.open_reader() as reader:
        if reader.size != size:
            return False
        for piece in reader.iter_range(0, size):
            found = crc32_of(piece, found)
            if progress is not None:
                progress(0)
    return found == crc32


def same_content(
    source: Place, dest: Place, *, change: Change | None = None, progress: Progress | None = None
) -> Copied | None:
    """What is at DEST if it holds what `copy_file` would put there, else None.

    Reads both where sizes agree, or where `change` may have made them differ.
    """
    try:
        dest_reader = dest.open_reader()
    except NotFoundInStoreError:
        return None
    with dest_reader, source.open_reader() as source_reader:
        if change is not None and max(source_reader.size, dest_reader.size) <= MAX_CHANGED_NBYTES:
            wanted = change(source_reader.read(0, source_reader.size))
            same = wanted == dest_reader.read(0, dest_reader.size)
            return Copied(dest_reader.size, 0, dest_reader.identity) if same else None
        if source_reader.size != dest_reader.size:
            return None
        for offset in range(0, source_reader.size, CHUNK_NBYTES):
            nbytes = min(CHUNK_NBYTES, source_reader.size - offset)
            if source_reader.read(offset, nbytes) != dest_reader.read(offset, nbytes):
                return None
            if progress is not None:
                progress(nbytes)
        return Copied(dest_reader.size, 0, dest_reader.identity)
