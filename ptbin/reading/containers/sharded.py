"""Hugging Face's shards: an index of names (`*.index.json`) and the files that hold them.

An index of format `raw` is `raw`'s to read. Each file is read by its own container's reader.
"""

from __future__ import annotations

from typing import Any

from ptbin.errors import CorruptArchiveError, OutputCollisionError
from ptbin.reading.containers.checkpoint import Checkpoint, Folder, read_part
from ptbin.reading.containers.raw import read_raw
from ptbin.sources.folders import INDEX_SUFFIX
from ptbin.sources.opening import parse_index
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import Storage

__all__ = ["read_indexed"]


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
        return read_raw(folder, index, opening)
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
