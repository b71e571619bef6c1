"""`torch.distributed.checkpoint` folders: one pickled index, and chunks of tensors in the files next to it.

`.metadata` holds a `Metadata`: per flattened name the whole tensor's type, size and chunks (boxes), where
each chunk's bytes are (file, offset, length), and the path each name had before it was flattened. A chunk
is a separate `torch.save` archive inside a `.distcp` file; other entries are `torch.save`d objects. With
`SerializationFormat.SAFETENSORS` the tensors of a file are one safetensors blob behind its other entries,
which torch's own reader of such folders cannot read back. Sources: torch/distributed/checkpoint/
metadata.py, filesystem.py, planner_helpers.py, _nested_dict.py, 2.13.

A tensor of one chunk keeps that chunk's place; chunks along the first dimension become a `Joined`, all
others a `Tiled`. torch loads the objects with `weights_only=False`, so their pickles are judged as well.

Costs: one read of `.metadata`, then of every chunk the first and last KiB, in the order of the files:
neighbours share requests, so about one a chunk; far fewer where chunks are small or the store bridges gaps
(it then fetches the weights between and drops them). Memory: the index, one record a chunk.
"""

from __future__ import annotations

from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError
from ptbin.merging.tiles import Box, Part, whole_tensor
from ptbin.reading.containers.checkpoint import Checkpoint, Folder, read_part
from ptbin.reading.containers.dcp.chunks import Chunks
from ptbin.reading.containers.dcp.index import Entry, Span, entries_of
from ptbin.reading.containers.dcp.tree import is_torch_dist, split_by_role, tree_of
from ptbin.reading.containers.megatron import megatron_facts
from ptbin.sources.folders import COMMON_STATE, DCP_METADATA, LIGHTNING_METADATA
from ptbin.values.nodes import DictNode, Instance, Opaque, iter_nodes
from ptbin.values.state_dict import Excluded
from ptbin.values.tensors import ByteRange, InMemory, Storage, TensorRef, dense_strides


def read_dcp(folder: Folder) -> Checkpoint:
    """Index a `torch.distributed.checkpoint` folder.

    Raises:
        CorruptArchiveError: chunks that overlap, leave gaps, lie outside of their file, or are other
            tensors than the index says.
        IncompleteCheckpointError: files that are missing.
        UnsupportedFormatError: chunks written through an extension (compression).
        LimitExceededError: more than the limits allow.
    """
    reader, limits = folder.reader, folder.limits
    part = reader.part(DCP_METADATA)
    if part.size > limits.pickle_nbytes:
        raise LimitExceededError(
            f"{part.uri}: {part.size} bytes, the limit is {limits.pickle_nbytes}", limit="pickle_nbytes"
        )
    opening = folder.opening(DCP_METADATA)
    program = opening.run_whole(part.read(0, part.size), DCP_METADATA, part.uri)
    entries = entries_of(reader, program.root, limits)
    program.root = None  # the entries say all of it, in less memory
    found = Chunks(reader, opening, limits).read_all(entries)
    storages: dict[str, Storage] = {}
    seen: set[int] = set()
    values = [(entry, _value(reader.uri, entry, found, storages, seen)) for entry in entries]
    excluded: list[Excluded] = []
    facts: dict[str, int] = {}
    if is_torch_dist(reader.names, entries):
        facts = megatron_facts(DictNode("dict", [(entry.name, value) for entry, value in values]))
        values, excluded = split_by_role(values)
    root = tree_of(reader.uri, values)
    for name in (LIGHTNING_METADATA, COMMON_STATE):
        if name not in reader.names:
            continue
        # What is neither module nor optimizer (Lightning), what all ranks share (Megatron); it is unpickled.
        rest = read_part(reader, name, opening)
        storages.update({f"{name}/{key}": storage for key, storage in rest.storages.items()})
        if name == LIGHTNING_METADATA:
            root.pairs.append((name, rest.root))
        else:
            excluded.append(Excluded(name, "trainer_state", node=rest.root))
            facts = facts or megatron_facts(rest.root)
    return folder.build("torch_dcp", root, opening, storages, excluded=excluded, facts=facts, is_whole=True)


# -- whole tensors -------------------------------------------------------------------------------------


def _value(
    uri: str,
    entry: Entry,
    found: dict[tuple[Span, str | None], Any],
    storages: dict[str, Storage],
    seen: set[int],
) -> Any:
    """What stands under one name; its storages are added to `storages`, objects walked to `seen`."""
    if entry.span is not None:
        value = found[entry.span, None]
        for node in iter_nodes(value, seen):
            if isinstance(node, TensorRef):
                _register(storages, f"{entry.name}/{node.storage.key}", node.storage)
        return value
    if entry.opaque is not None:
        return entry.opaque
    assert entry.dtype is not None
    if 0 in entry.shape:
        empty = Storage(entry.name, 0, InMemory(b""))
        dense = dense_strides(entry.shape)
        return TensorRef(_register(storages, entry.name, empty), entry.dtype, entry.shape, dense)
    pieces = []
    for chunk in entry.chunks:
        tensor = found.get((chunk.span, None), found.get((chunk.span, entry.name)))
        if not isinstance(tensor, TensorRef):
            kind = tensor.class_path if isinstance(tensor, Instance) else type(tensor).__name__
            return Opaque("distributed tensor", f"its chunks are stored as {kind[:200]}")
        if tensor.dtype != entry.dtype or tensor.shape != chunk.shape:
            raise CorruptArchiveError(
                f"{uri}: the chunk of {entry.name[:200]!r} at {list(chunk.start)} should be "
                f"{entry.dtype.name} {list(chunk.shape)}, {chunk.span.file} holds {tensor.dtype.name} "
                f"{list(tensor.shape)}"
            )
        pieces.append(tensor)
    if len(pieces) == 1:
        _register(storages, entry.name, pieces[0].storage)
        return pieces[0]
    plain = all(
        t.quantizer is None
        and not t.flags
        and t.dtype.per_unit == 1
        and t.storage.big_endian == pieces[0].storage.big_endian
        and isinstance(t.storage.place, (ByteRange, InMemory))
        for t in pieces
    )
    if not plain:
        return Opaque("distributed tensor", "its chunks are quantized, compressed or lazily conjugated")
    boxes = [
        Box(Part(tensor, chunk.span.file), chunk.start, chunk.shape, 0, tensor.stride)
        for chunk, tensor in zip(entry.chunks, pieces, strict=True)
    ]
    what = f"{uri}: the chunks of {entry.name[:200]!r}"
    whole = whole_tensor(what, entry.name, entry.dtype, entry.shape, boxes)
    whole.storage.big_endian = pieces[0].storage.big_endian
    _register(storages, entry.name, whole.storage)
    return whole


def _register(storages: dict[str, Storage], key: str, storage: Storage) -> Storage:
    """Register a storage under a key that no other one has."""
    if storages.setdefault(key, storage) is not storage:
        key = f"{key}#{len(storages)}"
        storages[key] = storage
    storage.key = key
    return storage
