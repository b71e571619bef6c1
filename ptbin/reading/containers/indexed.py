"""Files and an index of them (`*.index.json`): Hugging Face's shards, and format `raw`.

Hugging Face's index says which file holds which name; each file is read by its own container's reader.

That of `raw` describes tensors one behind the other: `metadata` (`format` is `raw`, `version` 1, `byte_order`
`little`, `alignment` 64, `total_size`), and `tensors`, by name: `dtype` (torch's name), `shape`, `file`,
`offset` and `nbytes`. Tensors that share memory give the same offset.
"""

from __future__ import annotations

import math
from typing import Any

from ptbin.errors import CorruptArchiveError, OutputCollisionError
from ptbin.reading.containers.checkpoint import Checkpoint, Folder, Opening, read_part
from ptbin.sources.folders import INDEX_SUFFIX
from ptbin.sources.opening import parse_index
from ptbin.values.dtypes import BY_NAME
from ptbin.values.nodes import DictNode, sizes_in
from ptbin.values.tensors import ByteRange, Storage, TensorRef, dense_strides


def read_indexed(folder: Folder) -> Checkpoint:
    """Index the files that an index lists.

    Raises:
        CorruptArchiveError: the files and the index contradict each other.
        OutputCollisionError: two files hold one name.
    """
    reader = folder.reader
    index_name = next(name for name in reader.names if name.endswith(INDEX_SUFFIX))
    part = reader.part(index_name)
    index = parse_index(part.read(0, part.size), reader.uri)
    opening = folder.opening(index_name)
    if "weight_map" not in index:
        return _read_raw(folder, index, opening)
    root: DictNode | None = None
    storages: dict[str, Storage] = {}
    home: dict[str, str] = {}
    containers = set()
    metadata: dict[str, str] = {}
    for name in reader.names:
        if name == index_name:
            continue
        checkpoint = read_part(reader, name, opening)
        containers.add(checkpoint.container)
        metadata.update(checkpoint.metadata)
        if not isinstance(checkpoint.root, DictNode):
            raise CorruptArchiveError(f"{reader.uri}: {name} holds no mapping of names to tensors")
        if root is None:
            root = DictNode(checkpoint.root.kind)
            root.state = checkpoint.root.state
        for key, value in checkpoint.root.pairs:
            if key in home:
                raise OutputCollisionError(f"{reader.uri}: {key!r} is in {home[key]} and in {name}")
            home[key] = name
            root.pairs.append((key, value))
        storages.update({f"{name}/{key}": storage for key, storage in checkpoint.storages.items()})
    _compare_with_index(reader.uri, index["weight_map"], home)
    container = "safetensors_sharded" if containers == {"safetensors"} else "torch_sharded"
    return folder.build(container, root, opening, storages, metadata=metadata)


def _compare_with_index(uri: str, weight_map: dict[str, Any], home: dict[str, str]) -> None:
    wrong = [name for name, file in weight_map.items() if home.get(name) != file]
    if wrong:
        name = wrong[0]
        found = f"it is in {home[name]}" if name in home else "no file has it"
        raise CorruptArchiveError(
            f"{uri}: the index puts {name!r} into {weight_map[name]}, {found} ({len(wrong)} such names)"
        )


def _read_raw(folder: Folder, index: dict[str, Any], opening: Opening) -> Checkpoint:
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
