"""Files that are known by how they begin and not read: refused by name, with the way out.

The weights of a file that is compressed as a whole are not byte ranges. Whether a checkpoint is inside is
looked up in the first bytes of a gzip file, which is what people wrap checkpoints in (`.nemo` of NeMo 1,
SageMaker's `model.tar.gz`). Costs nothing beyond the head.
"""

from __future__ import annotations

import shlex
import zlib

from ptbin.errors import NotACheckpointError, PtbinError, UnsupportedFormatError
from ptbin.reading.containers.checkpoint import Opening
from ptbin.reading.containers.legacy import looks_like_legacy
from ptbin.reading.containers.safetensors import looks_like_safetensors
from ptbin.reading.containers.source import EDGE_NBYTES, MemoryReader, SourceFile
from ptbin.reading.containers.tar import iter_tar, looks_like_tar

MAX_INFLATED_NBYTES = 1 << 20
"""Of the head: enough for a configuration and tokenizers that stand before the weights."""

_GZIP = b"\x1f\x8b"

# First bytes; what it is; the commands for a tar inside and for a single file.
_KINDS = (
    (_GZIP, "a gzip file", "tar -xzf {0}", "gzip -dc {0} > {1}"),
    (b"\xfd7zXZ\x00", "an xz file", "tar -xJf {0}", "xz -dc {0} > {1}"),
    (b"BZh", "a bzip2 file", "tar -xjf {0}", "bzip2 -dc {0} > {1}"),
    (b"\x28\xb5\x2f\xfd", "a zstandard file", "tar --zstd -xf {0}", "zstd -dc {0} > {1}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {0}", "7z x {0}"),
)
_NAMES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".th", ".tar", ".nemo")


_FOREIGN = (
    (b"\x89HDF", "an HDF5 file (Keras, maybe)"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy array file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"Rar!\x1a\x07", "a RAR archive; unpack it"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x7fELF", "a program or library"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG\r\n", "a PNG image"),
)
# In any case, behind white space or a byte order mark.
_TEXTS = (
    (b"<!doctype", "an HTML page; was the download refused?"),
    (b"<html", "an HTML page; was the download refused?"),
    (b"<?xml", "XML, as a store answers a refused download"),
    (b"{", "JSON text"),
    (b"[", "JSON text"),
)
_ONNX_VERSIONS = range(1, 32)


def refuse_compressed(opening: Opening) -> None:
    """Refuse a file that is compressed as a whole; nothing happens to others.

    Raises:
        UnsupportedFormatError: a checkpoint is inside, or an archive that holds one.
        NotACheckpointError: none is known to be inside.
    """
    head = opening.file.head(EDGE_NBYTES)
    kind = next((kind for kind in _KINDS if head.startswith(kind[0])), None)
    if kind is None:
        return
    magic, what, for_tar, for_file = kind
    uri = opening.file.uri
    name = uri.rstrip("/").rpartition("/")[2]
    quoted = shlex.quote(name), shlex.quote(f"{name}.unpacked")
    unpack, decompress = f"`{for_tar.format(*quoted)}`", f"`{for_file.format(*quoted)}`"
    if magic != _GZIP:
        other = "" if unpack == decompress else f" (or {decompress} where it is not a tar)"
        raise NotACheckpointError(f"{uri}: this is {what}; unpack it with {unpack}{other}")
    inside = _inflated(head)
    if looks_like_tar(inside):
        held = _checkpoint_in_tar(inside)
        if held is None:
            raise NotACheckpointError(f"{uri}: a compressed tar archive; unpack it with {unpack}")
        raise UnsupportedFormatError(
            f"{uri}: a compressed tar archive with {held[:200]!r} in it; "
            f"unpack it with {unpack} and convert that"
        )
    message = f"{uri}: this is {what}; decompress it with {decompress} and convert that"
    if inside[:4] == b"PK\x03\x04" or looks_like_legacy(inside) or looks_like_safetensors(inside, 1 << 62):
        raise UnsupportedFormatError(message)
    raise NotACheckpointError(message)


def refuse_known_foreign(opening: Opening) -> None:
    """Name what the file is where its first bytes tell.

    Raises:
        NotACheckpointError: another kind of file.
    """
    head = opening.file.head(512)
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise NotACheckpointError(f"{opening.file.uri}: this is {what}")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    what = next((what for beginning, what in _TEXTS if text[:9].lower().startswith(beginning)), "")
    if what and b"\0" not in text:
        raise NotACheckpointError(f"{opening.file.uri}: this is {what}")
    # Field 1 of an ONNX ModelProto is `ir_version`, field 2 the producer's name, 7 the graph (onnx.proto).
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x3a") and head[1] in _ONNX_VERSIONS:
        raise NotACheckpointError(f"{opening.file.uri}: this is an ONNX model, maybe")


def _inflated(head: bytes) -> bytes:
    try:
        # 31: a gzip header, and the largest window (zlib's manual, inflateInit2)
        return zlib.decompressobj(31).decompress(head, MAX_INFLATED_NBYTES)
    except zlib.error:
        return b""


def _checkpoint_in_tar(inside: bytes) -> str | None:
    """The first member with a checkpoint's name, as far as the tar was inflated."""
    try:
        for member in iter_tar(SourceFile(MemoryReader(inside, "the beginning of a gzip file"))):
            if member.name.lower().endswith(_NAMES):
                return member.name
    except PtbinError:
        return None
    return None
