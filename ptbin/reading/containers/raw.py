"""Format `raw`: tensors one behind the other, described by a JSON index beside them.

The index is `<name>.bin.index.json`: `metadata` (`format` is `raw`, `version` 1, `byte_order` `little`,
`alignment` 64, `total_size`), and `tensors`, by name: `dtype` (torch's name), `shape`, `file`, `offset` and
`nbytes`. Tensors that share memory give the same offset.
"""

from __future__ import annotations

import math
from typing import Any

from ptbin.errors import CorruptArchiveError
from ptbin.reading.containers.checkpoint import Checkpoint, Folder, Opening
from ptbin.values.dtypes import BY_NAME
from ptbin.values.nodes import DictNode, sizes_in
from ptbin.values.tensors import ByteRange, Storage, TensorRef, dense_strides

__all__ = ["read_raw"]


def read_raw(folder: Folder, index: dict[str, Any], opening: Opening) -> Checkpoint:
    """Index format `raw`; one storage for each distinct range.

    Raises:
        CorruptArchiveError: another version, or tensors that do not fit their files.
    """
    reader = folder.reader
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
        shape, place = sizes_in(row.get("shape")), sizes_in([row.get("offset"), row.get("nbytes")])
        dtype = BY_NAME.get(row.get("dtype")) if isinstance(row.get("dtype"), str) else None
        if dtype is None or shape is None or place is None or place[1] != dtype.nbytes_of(math.prod(shape)):
            raise CorruptArchiveError(f"{reader.uri}: {name[:200]!r} is not described consistently")
        offset, nbytes = place
        part = reader.part(row["file"])
        if offset + nbytes > part.size:
            raise CorruptArchiveError(f"{reader.uri}: {name!r} ends behind the end of {row['file']}")
        where = (row["file"], offset, nbytes)
        if where not in shared or not nbytes:
            shared[where] = Storage(name, nbytes, ByteRange(part.base + offset, nbytes, member=repr(name)))
        storages[name] = shared[where]
        root.pairs.append((name, TensorRef(shared[where], dtype, shape, dense_strides(shape))))
    return folder.build("raw", root, opening, storages, is_whole=True)
