"""Checkpoints of several files: each file read by its own container's reader, then joined into one record.

Owns nothing of a format but Hugging Face's index. Ranges found in one file are moved into the address
space of the whole (`stores.joined`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ptbin.deepspeed_names import deepspeed_checkpoint
from ptbin.errors import CorruptArchiveError, OutputCollisionError, UnsupportedFormatError
from ptbin.folders import DCP_METADATA, INDEX_SUFFIX
from ptbin.nodes import DictNode
from ptbin.options import Limits
from ptbin.part_names import is_meta_name, is_rank_name
from ptbin.reading.checkpoint import Checkpoint, Opening, read_opened
from ptbin.reading.source import SourceFile
from ptbin.sources import parse_index
from ptbin.stores.joined import JoinedReader, PartReader
from ptbin.tensors import ByteRange, Deflated, InMemory, Joined, Place, Storage, Tiled

__all__ = ["move_place", "read_folder", "read_part"]


def read_folder(reader: JoinedReader, limits: Limits, recipe: str | None = None) -> Checkpoint:
    """Index a checkpoint of several files; `recipe` says how parts make a whole that do not say.

    Raises:
        CorruptArchiveError: the files contradict each other. UnsupportedFormatError: no kind ptbin knows.
    """
    if DCP_METADATA in reader.names:
        from ptbin.reading.dcp import read_dcp

        return read_dcp(reader, limits)
    kind = deepspeed_checkpoint(reader.names)[0]
    if kind:
        return _read_deepspeed(kind, reader, limits, recipe)
    index = next((name for name in reader.names if name.endswith(INDEX_SUFFIX)), None)
    if is_meta_name(reader.names[0]):
        from ptbin.reading.meta_parts import read_meta_parts

        return read_meta_parts(reader, limits, recipe)
    if index is None and is_rank_name(reader.names[0]):
        from ptbin.reading.rank_files import read_rank_files

        return read_rank_files(reader, limits)
    if index is None:
        raise UnsupportedFormatError(f"{reader.uri}: a folder of no known kind")
    return _read_indexed(reader, index, limits)


def _read_deepspeed(kind: str, reader: JoinedReader, limits: Limits, recipe: str | None) -> Checkpoint:
    if kind == "deepspeed_universal":
        from ptbin.reading.deepspeed_universal import read_deepspeed_universal

        return read_deepspeed_universal(reader, limits)
    if kind == "deepspeed_layers":
        from ptbin.reading.deepspeed_layers import read_deepspeed_layers

        return read_deepspeed_layers(reader, limits, recipe)
    if kind == "deepspeed_experts":
        from ptbin.reading.deepspeed_experts import read_deepspeed_experts

        return read_deepspeed_experts(reader, limits)
    if kind == "deepspeed_ranks":
        from ptbin.reading.deepspeed_ranks import read_deepspeed_ranks

        return read_deepspeed_ranks(reader, limits, recipe)
    from ptbin.reading.deepspeed import read_deepspeed

    return read_deepspeed(reader, limits)


def read_part(reader: JoinedReader, name: str, opening: Opening) -> Checkpoint:
    """One file of the folder as a checkpoint by itself, its places moved into the whole's address space.

    Its pickles, and what they carry in themselves, are added to those of `opening`.
    """
    part = reader.part(name)
    inner = Opening(SourceFile(part), opening.limits, opening.depth, opening.programs)
    inner.vocabulary = opening.vocabulary  # which counts the bytes inside pickles
    checkpoint = read_opened(inner)
    for storage in checkpoint.storages.values():
        assert storage.place is not None
        storage.place = move_place(storage.place, part.base)
    return checkpoint


def move_place(place: Place, base: int) -> Place:
    """The place with its offsets counted from `base` bytes earlier."""
    if isinstance(place, ByteRange):
        record = None if place.record_offset is None else place.record_offset + base
        return dataclasses.replace(place, offset=place.offset + base, record_offset=record)
    if isinstance(place, Deflated):
        return dataclasses.replace(place, offset=place.offset + base)
    if isinstance(place, InMemory):
        return place
    if isinstance(place, Joined):
        return Joined(tuple(_moved_part(part, base) for part in place.parts))
    tiles = (dataclasses.replace(tile, place=_moved_part(tile.place, base)) for tile in place.tiles)
    return Tiled(place.shape, place.itemsize, tuple(tiles))


def _moved_part(place: ByteRange | InMemory, base: int) -> ByteRange | InMemory:
    moved = move_place(place, base)
    assert isinstance(moved, (ByteRange, InMemory))
    return moved


def _read_indexed(reader: JoinedReader, index_name: str, limits: Limits) -> Checkpoint:
    part = reader.part(index_name)
    index = parse_index(part.read(0, part.size), reader.uri)
    opening = Opening(SourceFile(part), limits)
    if "weight_map" not in index:
        from ptbin.reading.raw import read_raw

        return read_raw(reader, index, opening)
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
    return Checkpoint(
        reader.uri,
        reader.size,
        container,
        root,
        opening.programs,
        storages,
        opening.vocabulary,
        metadata=metadata,
    )


def _compare_with_index(uri: str, weight_map: dict[str, Any], home: dict[str, str]) -> None:
    wrong = [name for name, file in weight_map.items() if home.get(name) != file]
    if wrong:
        name = wrong[0]
        found = f"it is in {home[name]}" if name in home else "no file has it"
        raise CorruptArchiveError(
            f"{uri}: the index puts {name!r} into {weight_map[name]}, {found} ({len(wrong)} such names)"
        )


def parts_by_name(reader: JoinedReader) -> dict[str, PartReader]:
    """Every file of the folder."""
    return {name: reader.part(name) for name in reader.names}
