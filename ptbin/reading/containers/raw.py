"""Format `raw`: tensors one behind the other, described by a JSON index beside them.

The index is `<name>.bin.index.json`: `metadata` (`format` is `raw`, `version` 1, `byte_order` `little`,
`alignment` 64, `total_size`), and `tensors`, by name: `dtype` (torch's name), `shape`, `file`, `offset` and
`nbytes`. Tensors that share memory give the same offset.
"""

from __future__ import annotations

import math
from typing import Any

from ptbin.errors import CorruptArchiveError
from ptbin.reading.containers.checkpoint import Checkpoint, Opening
from ptbin.stores.joined import JoinedReader
from ptbin.values.dtypes import BY_NAME
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import ByteRange, Storage, TensorRef, dense_strides

__all__ = ["read_raw"]


def read_raw(reader: JoinedReader, index: dict[str, Any], opening: Opening) -> Checkpoint:
    """Index format `raw`; one storage for each distinct range.

    Raises:
        CorruptArchiveError: another version, or tensors that do not fit their files.
    """
    metadata = index.get("metadata")
    if (
        not isinstance(metadata, dict)
        or metadata.get("format") != "raw"
        or metadata.get("version") != 1
        or metadata.get("byte_order") != "little"
    ):
        raise CorruptArchiveError(f"{reader.uri}: not an index of format raw, version 1, little-endian")
    stored = sum(reader.part(name).size for name in index["files"])
    if metadata.get("total_size") != stored:
        raise CorruptArchiveError(
            f"{reader.uri}: its files hold {stored} bytes, the index says {metadata.get('total_size')}"
        )
    root = DictNode("OrderedDict")
    storages: dict[str, Storage] = {}
    shared: dict[tuple[str, int, int], Storage] = {}
    for name, row in index["tensors"].items():
        shape, offset, nbytes = row.get("shape"), row.get("offset"), row.get("nbytes")
        dtype = BY_NAME.get(row.get("dtype")) if isinstance(row.get("dtype"), str) else None
        if (
            dtype is None
            or not isinstance(shape, list)
            or not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, offset, nbytes))
            or nbytes != dtype.nbytes_of(math.prod(shape))
        ):
            raise CorruptArchiveError(
                f"{reader.uri}: {name[:200]!r} is described in a way that makes no sense"
            )
        part = reader.part(row["file"])
        if offset + nbytes > part.size:
            raise CorruptArchiveError(f"{reader.uri}: {name!r} ends behind the end of {row['file']}")
        place = (row["file"], offset, nbytes)
        if place not in shared or not nbytes:
            shared[place] = Storage(name, nbytes, ByteRange(part.base + offset, nbytes, member=repr(name)))
        storages[name] = shared[place]
        root.pairs.append((name, TensorRef(shared[place], dtype, tuple(shape), dense_strides(tuple(shape)))))
    return Checkpoint(reader.uri, reader.size, "raw", root, opening.programs, storages, opening.vocabulary)
