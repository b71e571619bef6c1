"""`torch.distributed.checkpoint` folders: one pickled index, and chunks of tensors in the files beside it.

`.metadata` holds a `Metadata`: per flattened name the whole tensor's type, size and chunks (boxes), where
each chunk's bytes are (file, offset, length), and the path each name had before it was flattened. A chunk
is a `torch.save` archive of its own inside a `.distcp` file; other entries are `torch.save`d objects. With
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

import dataclasses
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ptbin.errors import (
    CorruptArchiveError,
    IncompleteCheckpointError,
    LimitExceededError,
    UnsupportedFormatError,
)
from ptbin.merging.coverage import prove_cover, split_dimensions
from ptbin.options import Limits
from ptbin.reading.containers.checkpoint import Checkpoint, Folder, Opening, move_place, read_part
from ptbin.reading.containers.megatron import megatron_facts
from ptbin.reading.containers.megatron_dist import is_torch_dist, set_aside
from ptbin.reading.containers.safetensors import looks_like_safetensors
from ptbin.reading.containers.source import SourceFile, Window
from ptbin.reading.pickle.interpreter import run_pickle
from ptbin.reading.pickle.machine import PickleProgram
from ptbin.sources.folders import COMMON_STATE, DCP_METADATA, LIGHTNING_METADATA
from ptbin.stores.joined import JoinedReader
from ptbin.values.dtypes import DType, dtype_by_name
from ptbin.values.nodes import DictNode, Global, Instance, Opaque, iter_nodes
from ptbin.values.state_dict import Excluded
from ptbin.values.tensors import (
    ByteRange,
    InMemory,
    Joined,
    Place,
    Storage,
    TensorRef,
    Tile,
    Tiled,
    dense_strides,
)

__all__ = ["read_dcp"]

# An archive of one tensor by torch 2.13: the pickle and what stands before the data take 0.7 KiB, the
# directory and its end 0.6 KiB. What does not fit costs that chunk a request more.
EDGE_NBYTES = 1024
BATCH = 512
"""Chunks whose edges are in memory at once."""

MAX_PATH = 64
"""Steps of a path to an entry; `state_dict.MAX_DEPTH` looks no deeper than half of it."""

MAX_NAME = 1 << 16

_METADATA_CLASSES = "torch.distributed.checkpoint.metadata."
_METADATA = (
    _METADATA_CLASSES + "Metadata",
    # megatron-core 0.14 and 0.15, with the same attributes and more
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
)
# An optimizer's or a scheduler's entry, flattened: told by what it holds, because a module of a model
# may be called `opt` or `optimal_transport`.
_STATE_NAMES = frozenset(
    """exp_avg exp_avg_sq max_exp_avg_sq exp_inf momentum_buffer square_avg grad_avg acc_delta
    exp_avg_res exp_avg_sq_row exp_avg_sq_col exp_avg_var previous_grad row_momentum col_momentum""".split()
)
_SCHEDULER_NAMES = frozenset("last_epoch _step_count base_lrs _last_lr _get_lr_called_within_step".split())
_OPTIMIZER_PREFIX = re.compile(r"^(?P<group>[^.]+)\.(?P<rest>(?:state|param_groups)\..+)$")
_NAMED_SO = re.compile(r"^(optim|opt$|opt_|lr_sched)", re.IGNORECASE)
_CHUNK_FILE = re.compile(r"^__\d+_\d+\.distcp$")
_GROUP_NAMES = ("model", "state_dict", "model_state_dict", "weights")
# As in `selection`: whole numbers are counters and tables, bytes are random generators.
_COUNTERS = ("int64", "int32", "int16", "bool", "uint8")


@dataclass(frozen=True, slots=True)
class _Span:
    """Where one chunk or object was written: `offset` within the folder's address space."""

    offset: int
    nbytes: int
    file: str


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One box of a tensor, in elements, and its bytes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    span: _Span


@dataclass(slots=True)
class _Entry:
    """One flattened name: a tensor (`dtype` set) with its non-empty chunks, or an object in one span."""

    name: str
    path: tuple[str | int, ...]
    dtype: DType | None = None
    shape: tuple[int, ...] = ()
    chunks: list[_Chunk] = field(default_factory=list)
    span: _Span | None = None
    opaque: Opaque | None = None


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
        raise LimitExceededError(f"{part.uri}: {part.size} bytes, the limit is {limits.pickle_nbytes}")
    opening = folder.opening(DCP_METADATA)
    raw = part.read(0, part.size)
    program = run_pickle(
        raw,
        reducers=opening.vocabulary.reducers(),
        set_state=opening.vocabulary.set_state,
        limits=limits,
        where=part.uri,
    )
    if program.end != len(raw):
        program.oddities.append(f"{len(raw) - program.end} bytes behind the end of {DCP_METADATA}")
    opening.programs.append(program)
    entries = _Index(reader, program.root, limits).entries()
    program.root = None  # the entries say all of it, in less memory
    found = _Spans(reader, opening, limits).read_all(entries)
    storages: dict[str, Storage] = {}
    seen: set[int] = set()
    values = [(entry, _value(reader.uri, entry, found, storages, seen)) for entry in entries]
    excluded: list[Excluded] = []
    facts: dict[str, int] = {}
    if is_torch_dist(reader.names, entries):
        facts = megatron_facts(DictNode("dict", [(entry.name, value) for entry, value in values]))
        values, excluded = set_aside(values)
    root = _tree(reader.uri, values)
    for name in (LIGHTNING_METADATA, COMMON_STATE):
        if name not in reader.names:
            continue
        # What is neither module nor optimizer (Lightning), what is no rank's own (Megatron); it is unpickled.
        rest = read_part(reader, name, opening)
        storages.update({f"{name}/{key}": storage for key, storage in rest.storages.items()})
        if name == LIGHTNING_METADATA:
            root.pairs.append((name, rest.root))
        else:
            excluded.append(Excluded(name, "trainer_state", node=rest.root))
            facts = facts or megatron_facts(rest.root)
    return Checkpoint(
        reader.uri,
        reader.size,
        "torch_dcp",
        root,
        opening.programs,
        storages,
        opening.vocabulary,
        excluded=excluded,
        facts=facts,
    )


# -- the index ---------------------------------------------------------------------------------------


class _Index:
    """The `Metadata` record, checked against itself and the files there are."""

    def __init__(self, reader: JoinedReader, root: Any, limits: Limits) -> None:
        self.uri = f"{reader.uri}/{DCP_METADATA}"
        self._reader = reader
        self._limits = limits
        self._names = frozenset(reader.names)
        state = _state(root)
        if state is None or root.class_path not in _METADATA:
            raise CorruptArchiveError(f"{self.uri}: holds no torch.distributed.checkpoint Metadata")
        self._tensors = self._mapping(state.get("state_dict_metadata"), "state_dict_metadata")
        self._storage = self._mapping(state.get("storage_data"), "storage_data")
        paths = state.get("planner_data")
        # Planners of people's own keep other things there.
        self._paths = paths.by_name() if isinstance(paths, DictNode) else {}
        self._count = 0

    def entries(self) -> list[_Entry]:
        """Every name, in the order of the state dict where the index has kept it."""
        spans = self._spans()
        described = self._tensors.by_name()
        # The order of `state_dict_metadata` is that in which ranks were given things to write.
        order = [name for name in self._paths if name in described]
        order += [name for name in described if name not in self._paths]
        if any(len(name) > MAX_NAME for name in order):
            raise LimitExceededError(f"{self.uri}: a name of more than {MAX_NAME} characters")
        return [self._entry(name, described[name], spans) for name in order]

    def _mapping(self, value: Any, what: str) -> DictNode:
        if not isinstance(value, DictNode):
            raise CorruptArchiveError(f"{self.uri}: {what} is no mapping")
        return value

    def _spans(self) -> dict[tuple[str, tuple[int, ...] | None], _Span]:
        found: dict[tuple[str, tuple[int, ...] | None], _Span] = {}
        for key, value in self._storage.pairs:
            index, info = _state(key), _state(value)
            name = index.get("fqn") if index is not None else None
            if index is None or info is None or not isinstance(name, str):
                raise CorruptArchiveError(f"{self.uri}: storage_data holds something that is no storage info")
            if info.get("transform_descriptors"):
                raise UnsupportedFormatError(
                    f"{self.uri}: {name[:200]!r} was written through an extension (compression, say); load "
                    "the folder with torch.distributed.checkpoint and save it again without `_extensions`"
                )
            offset = index.get("offset")
            found[name, None if offset is None else self._ints(offset, name)] = self._span(name, info)
        return found

    def _span(self, name: str, info: DictNode) -> _Span:
        file, offset, nbytes = info.get("relative_path"), info.get("offset"), info.get("length")
        # Only a name that the folder's listing gave is ever opened.
        if type(file) is not str or file not in self._names or file == DCP_METADATA:
            where = (
                f"{self.uri}: {name[:200]!r} should lie in {_text(file)}, no file of this folder is called so"
            )
            if type(file) is str and _CHUNK_FILE.match(file):
                raise IncompleteCheckpointError(f"{where}; fetch it")
            raise CorruptArchiveError(f"{where}; is the copy complete?")
        part = self._reader.part(file)
        sane = type(offset) is int and type(nbytes) is int and offset >= 0 and nbytes >= 0
        if not sane or offset + nbytes > part.size:
            raise CorruptArchiveError(
                f"{self.uri}: {name[:200]!r} should lie at byte {_number(offset)} of {file} with "
                f"{_number(nbytes)} bytes; the file has {part.size}"
            )
        return _Span(part.base + offset, nbytes, file)

    def _entry(
        self, name: str, described: Any, spans: dict[tuple[str, tuple[int, ...] | None], _Span]
    ) -> _Entry:
        entry = _Entry(name, self._path(name))
        kind = described.class_path if isinstance(described, Instance) else "?"
        if kind == _METADATA_CLASSES + "BytesStorageMetadata":
            entry.span = spans.get((name, None))
            if entry.span is None:
                raise CorruptArchiveError(f"{self.uri}: nothing says where {name[:200]!r} is stored")
            return entry
        state = _state(described)
        if kind != _METADATA_CLASSES + "TensorStorageMetadata" or state is None:
            raise CorruptArchiveError(f"{self.uri}: {name[:200]!r} is described by {kind[:200]}")
        entry.dtype = _dtype_of(state.get("properties"))
        entry.shape = self._ints(state.get("size"), name)
        if entry.dtype is None:
            entry.opaque = Opaque("tensor", "its element type is none that ptbin knows")
            return entry
        chunks = state.get("chunks")
        if not isinstance(chunks, list):
            raise CorruptArchiveError(f"{self.uri}: {name[:200]!r} has no list of chunks")
        entry.chunks = self._chunks(entry, chunks, spans)
        return entry

    def _chunks(
        self,
        entry: _Entry,
        described: list[Any],
        spans: dict[tuple[str, tuple[int, ...] | None], _Span],
    ) -> list[_Chunk]:
        """The non-empty chunks in row-major order, each once: ranks that hold the same may both list it."""
        self._count += len(described)
        if self._count > self._limits.tensors:
            raise LimitExceededError(f"{self.uri}: more than {self._limits.tensors} chunks")
        boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], None] = {}
        for chunk in described:
            state = _state(chunk) or DictNode()
            start, shape = (self._ints(state.get(key), entry.name) for key in ("offsets", "sizes"))
            if len(start) != len(entry.shape) or len(shape) != len(entry.shape):
                raise CorruptArchiveError(f"{self.uri}: a chunk of {entry.name[:200]!r} has other dimensions")
            if any(first + n > size for first, n, size in zip(start, shape, entry.shape, strict=True)):
                raise CorruptArchiveError(
                    f"{self.uri}: a chunk of {entry.name[:200]!r} at {list(start)} of {list(shape)} elements "
                    f"reaches beyond the tensor's {list(entry.shape)}"
                )
            if 0 not in shape:
                boxes[start, shape] = None
        ordered = sorted(boxes)
        prove_cover(f"{self.uri}: the chunks of {entry.name[:200]!r}", entry.shape, ordered)
        chunks = []
        for start, shape in ordered:
            span = spans.get((entry.name, start))
            if span is None:
                raise CorruptArchiveError(
                    f"{self.uri}: nothing says where the chunk of {entry.name[:200]!r} "
                    f"at {list(start)} is stored"
                )
            chunks.append(_Chunk(start, shape, span))
        return chunks

    def _path(self, name: str) -> tuple[str | int, ...]:
        path = self._paths.get(name, (name,))
        if not isinstance(path, tuple) or not path or not all(type(step) in (str, int) for step in path[:64]):
            raise CorruptArchiveError(f"{self.uri}: the path of {name[:200]!r} is none")
        if len(path) > MAX_PATH:
            raise LimitExceededError(f"{self.uri}: {name[:200]!r} lies {len(path)} levels deep")
        return path

    def _ints(self, value: Any, name: str) -> tuple[int, ...]:
        # 64 dimensions: `torch_objects.MAX_DIMENSIONS`
        if (
            not isinstance(value, (tuple, list))
            or len(value) > 64
            or not all(type(n) is int and 0 <= n < 1 << 62 for n in value)
        ):
            raise CorruptArchiveError(f"{self.uri}: {name[:200]!r} has sizes or offsets that make no sense")
        return tuple(value)


def _state(value: Any) -> DictNode | None:
    return value.attributes() if isinstance(value, Instance) else None


def _text(value: Any) -> str:
    return repr(value[:200]) if type(value) is str else type(value).__name__


def _number(value: Any) -> str:
    return str(value) if type(value) is int and abs(value) < 1 << 64 else type(value).__name__


def _dtype_of(properties: Any) -> DType | None:
    """`TensorProperties.__getstate__` gives a tuple that begins with the element type."""
    state = properties.state if isinstance(properties, Instance) else None
    first = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, DictNode):
        first = state.get("dtype")
    return dtype_by_name(first.name) if isinstance(first, Global) and first.module == "torch" else None


# -- the chunks' own archives ----------------------------------------------------------------------------


class _ChunkFile(SourceFile):
    """A `SourceFile` whose edges were read along with its neighbours' and are small."""

    def __init__(self, window: Window, edges: Sequence[tuple[int, bytes]]) -> None:
        super().__init__(window)
        self._blocks.extend(edges)

    def head(self, nbytes: int) -> bytes:
        known = self._cached(0, min(nbytes, self.size))
        return super().head(nbytes) if known is None else known

    def tail(self, nbytes: int) -> tuple[int, bytes]:
        offset, last = self._blocks[-1] if self._blocks else (0, b"")
        if offset + len(last) == self.size and b"PK\x05\x06" in last:
            return offset, last
        return super().tail(nbytes)


class _Spans:
    """What lies in the spans that an index names."""

    def __init__(self, reader: JoinedReader, opening: Opening, limits: Limits) -> None:
        self._reader = reader
        self._opening = opening
        self._limits = limits
        self._globals: set[tuple[str, str]] = set()
        self._blobs: dict[int, dict[str, Any]] = {}

    def read_all(self, entries: list[_Entry]) -> dict[tuple[_Span, str | None], Any]:
        """(span, None) to what its archive holds, (span, name) to a tensor of a safetensors blob.

        An object that is no torch archive (a planner may store any bytes) is an `Opaque`.
        """
        wanted: dict[_Span, list[str]] = {}
        objects: set[_Span] = set()
        for entry in entries:
            for chunk in entry.chunks:
                wanted.setdefault(chunk.span, []).append(entry.name)
            if entry.span is not None:
                wanted.setdefault(entry.span, [])
                objects.add(entry.span)
        found: dict[tuple[_Span, str | None], Any] = {}
        ordered = iter(sorted(wanted, key=lambda span: (span.offset, span.nbytes)))
        while batch := list(islice(ordered, BATCH)):
            for span, file in self._files(batch):
                if span not in objects and (blob := self._blob(span, file)) is not None:
                    found.update({(span, name): blob.get(name) for name in wanted[span]})
                else:
                    found[span, None] = self._archive(span, file, is_object=span in objects)
        return found

    def _files(self, spans: list[_Span]) -> Iterator[tuple[_Span, _ChunkFile]]:
        """Each span with its edges read: neighbours share requests."""
        ranges: list[tuple[int, int]] = []
        pieces: list[list[tuple[int, int]]] = []  # of each span: (range, offset in the span)
        for span in spans:
            small = span.nbytes <= 2 * EDGE_NBYTES
            last = (span.nbytes - EDGE_NBYTES, EDGE_NBYTES)
            edges = [(0, span.nbytes)] if small else [(0, EDGE_NBYTES), last]
            pieces.append([(len(ranges) + i, inner) for i, (inner, _) in enumerate(edges)])
            ranges.extend((span.offset + inner, nbytes) for inner, nbytes in edges)
        read = [bytearray() for _ in ranges]
        for index, data in self._reader.iter_ranges(ranges):
            read[index] += data
        for span, edges in zip(spans, pieces, strict=True):
            uri = f"{self._reader.uri}/{span.file} at byte {span.offset - self._base(span)}"
            window = Window(self._reader, span.offset, span.nbytes, uri)
            yield span, _ChunkFile(window, [(inner, bytes(read[index])) for index, inner in edges])

    def _base(self, span: _Span) -> int:
        return self._reader.part(span.file).base

    def _archive(self, span: _Span, file: _ChunkFile, *, is_object: bool) -> Any:
        """The record in one span, its storages placed in the folder's address space."""
        inner = self._open(file)
        try:
            checkpoint = inner.checkpoint()
        except UnsupportedFormatError as error:
            if not is_object:
                raise CorruptArchiveError(f"{file.uri}: expected a tensor: {error}") from error
            return Opaque("object", "bytes that are no torch.save archive", has_data=False)
        for storage in checkpoint.storages.values():
            assert storage.place is not None
            storage.place = _own_place(file, storage.place, span.offset)
        self._keep_programs(inner.programs)
        return checkpoint.root

    def _blob(self, span: _Span, file: _ChunkFile) -> dict[str, Any] | None:
        """The tensors of the safetensors blob that begins where the span does; None where none does.

        Every tensor in it is listed with the blob's offset and the tensor's own length.
        """
        if span.offset in self._blobs:
            return self._blobs[span.offset]
        if file.size >= 4 and file.head(4) == b"PK\x03\x04":
            return None
        rest = self._reader.part(span.file).size - (span.offset - self._base(span))
        whole = SourceFile(Window(self._reader, span.offset, rest, file.uri))
        if not looks_like_safetensors(whole.head(512), rest):
            return None
        checkpoint = self._open(whole).checkpoint()
        if not isinstance(checkpoint.root, DictNode):
            raise CorruptArchiveError(f"{file.uri}: expected a safetensors blob")
        for storage in checkpoint.storages.values():
            assert storage.place is not None
            storage.place = move_place(storage.place, span.offset)
        self._blobs[span.offset] = checkpoint.root.by_name()
        return self._blobs[span.offset]

    def _open(self, file: SourceFile) -> Opening:
        return self._opening.another(file, programs=[])

    def _keep_programs(self, programs: list[PickleProgram]) -> None:
        """Those that say something to judge which no earlier one said: there may be a million alike."""
        for program in programs:
            if program.globals.keys() <= self._globals and not program.oddities and not program.calls:
                continue
            self._globals.update(program.globals)
            self._opening.programs.append(program)


def _own_place(file: SourceFile, place: Place, base: int) -> Place:
    """A place inside a chunk's archive as one of the folder.

    Its framing counts offsets from the archive's own beginning, so it is of no use where the archive stands;
    the local header, at hand here, must put the data where the directory does.
    """
    if isinstance(place, ByteRange) and place.record_offset is not None:
        # APPNOTE.TXT 4.3.7: lengths of the name and of the extra field, at 26 of 30 bytes
        header = file.read(place.record_offset, 30, "local header")
        name_nbytes, extra_nbytes = struct.unpack_from("<HH", header, 26)
        stated = place.record_offset + 30 + name_nbytes + extra_nbytes
        if header[:4] != b"PK\x03\x04" or stated != place.offset:
            raise CorruptArchiveError(
                f"{file.uri}: member {place.member!r} should begin at byte {place.offset}, "
                f"its local header says {stated}"
            )
        place = dataclasses.replace(place, record_offset=None, closed=False)
    return move_place(place, base)


# -- whole tensors -------------------------------------------------------------------------------------


def _value(
    uri: str,
    entry: _Entry,
    found: dict[tuple[_Span, str | None], Any],
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
    dense = dense_strides(entry.shape)
    if 0 in entry.shape:
        empty = Storage(entry.name, 0, InMemory(b""))
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
    storage = Storage(
        entry.name, entry.dtype.nbytes_of(math.prod(entry.shape)), big_endian=pieces[0].storage.big_endian
    )
    storage.place = _joined(entry, pieces) or _tiled(entry, pieces)
    return TensorRef(_register(storages, entry.name, storage), entry.dtype, entry.shape, dense)


def _register(storages: dict[str, Storage], key: str, storage: Storage) -> Storage:
    """Take up a storage under a key that is its own."""
    if storages.setdefault(key, storage) is not storage:
        key = f"{key}#{len(storages)}"
        storages[key] = storage
    storage.key = key
    return storage


def _joined(entry: _Entry, pieces: list[TensorRef]) -> Joined | None:
    """The chunks one behind the other, where they are the whole's own order; their order is row-major."""
    split = split_dimensions(entry.shape, [(chunk.start, chunk.shape) for chunk in entry.chunks])
    if len(split) != 1 or math.prod(entry.shape[: split[0]]) != 1:
        return None
    places = [t.storage.place for t in pieces if t.contiguous and t.storage_offset == 0]
    ranges = [p for p in places if isinstance(p, (ByteRange, InMemory))]
    # A storage with more in it than the chunk keeps its CRC-32 only as a whole, which a tile can say.
    if len(ranges) != len(pieces) or any(p.nbytes != t.nbytes for p, t in zip(ranges, pieces, strict=True)):
        return None
    return Joined(tuple(ranges))


def _tiled(entry: _Entry, pieces: list[TensorRef]) -> Tiled:
    assert entry.dtype is not None
    tiles = []
    for chunk, tensor in zip(entry.chunks, pieces, strict=True):
        place = tensor.storage.place
        assert isinstance(place, (ByteRange, InMemory))
        offset = tensor.storage_offset * entry.dtype.itemsize
        tiles.append(Tile(chunk.start, chunk.shape, place, offset, tensor.stride))
    return Tiled(entry.shape, entry.dtype.itemsize, tuple(tiles))


# -- the state dict's own shape ------------------------------------------------------------------------


def _tree(uri: str, values: list[tuple[_Entry, Any]]) -> DictNode:
    """The nested mapping that was saved, as the paths in the index have it; lists come back as lists."""
    root: dict[str | int, Any] = {}
    for entry, value in values:
        node = root
        for step in entry.path[:-1]:
            node = node.setdefault(step, {})
            if type(node) is not dict:
                raise CorruptArchiveError(f"{uri}: {entry.name[:200]!r} lies below what is no mapping")
        if entry.path[-1] in node:
            raise CorruptArchiveError(f"{uri}: the path of {entry.name[:200]!r} is taken")
        node[entry.path[-1]] = value
    return _gathered(DictNode("dict", [(key, _as_nodes(value)) for key, value in root.items()]))


def _as_nodes(value: Any) -> Any:
    if type(value) is not dict:
        return value
    if all(type(key) is int for key in value) and sorted(value) == list(range(len(value))):
        return [_as_nodes(value[index]) for index in range(len(value))]
    return DictNode("dict", [(key, _as_nodes(below)) for key, below in value.items()])


def _gathered(root: DictNode) -> DictNode:
    """The tree with a model's entries that lie flat beside other states moved under a name of their own.

    torchtitan saves so: the model's own names, and among them `optimizer`, `lr_scheduler`, `dataloader`.
    Planners that keep no paths leave the optimizer's names flat as well.
    """
    groups: dict[str, DictNode] = {}
    flat: list[tuple[Any, Any]] = []
    for key, value in root.pairs:
        split = _split_optimizer_entry(key) if type(key) is str else None
        if split is None:
            flat.append((key, value))
        else:
            groups.setdefault(split[0], DictNode()).pairs.append((split[1], value))
    if groups.keys() & root.by_name().keys():
        return root
    pairs = [*flat, *groups.items()]
    weights = [
        key
        for key, v in flat
        if isinstance(v, TensorRef) and type(key) is str and v.dtype.name not in _COUNTERS
    ]
    beside = [(key, v) for key, v in pairs if _is_branch(v) and not str(key).endswith("_extra_state")]
    seen: set[int] = set()
    other_models = any(not _is_optimizer(v) and _holds_weights(v, seen) for _, v in beside)
    # A single tensor beside a model that has its own mapping is no model; dotted names are a module's.
    is_model = weights and (not other_models or any("." in key for key in weights))
    name = next((n for n in _GROUP_NAMES if root.get(n) is None), None)
    if not beside or not is_model or name is None:
        return DictNode("dict", pairs)
    model = [(key, v) for key, v in pairs if _belongs_to_model(key, v)]
    rest = [(key, v) for key, v in pairs if not _belongs_to_model(key, v)]
    return DictNode("dict", [(name, DictNode("dict", model)), *rest])


def _split_optimizer_entry(key: str) -> tuple[str, str] | None:
    """The optimizer's or scheduler's own name, and the entry's below it; None for what may be a model's.

    `optim.state.fc.weight.exp_avg` and `optim.param_groups.fc.weight.lr` (torch's flattened form), and
    `optim.fc.weight.exp_avg`, where the first name has to be an optimizer's as well.
    """
    first, dot, rest = key.partition(".")
    last = key.rpartition(".")[2]
    if not dot:
        return None
    if first in ("state", "param_groups"):
        is_state = first == "param_groups" or last in _STATE_NAMES or last == "step"
        return ("optimizer", key) if is_state else None
    named_so = _NAMED_SO.match(first) is not None
    if _OPTIMIZER_PREFIX.match(key) and (named_so or last in _STATE_NAMES or last == "step"):
        return first, rest
    if named_so and (last in _STATE_NAMES or last in _SCHEDULER_NAMES or last in ("step", "param_groups")):
        return first, rest
    return None


def _is_optimizer(value: Any) -> bool:
    """Whether a mapping is an optimizer's state dict, by what it holds."""
    if not isinstance(value, DictNode):
        return False
    named = value.by_name()
    if {"state", "param_groups"} & named.keys() or _SCHEDULER_NAMES & named.keys():
        return True
    lasts = {name.rpartition(".")[2] for name in named}
    return bool(lasts & _STATE_NAMES) or any(_is_moments(below) for below in named.values())


def _is_moments(value: Any) -> bool:
    return isinstance(value, DictNode) and bool(value.by_name().keys() & _STATE_NAMES)


def _is_branch(value: Any) -> bool:
    return isinstance(value, (DictNode, Instance, list, tuple))


def _belongs_to_model(key: Any, value: Any) -> bool:
    if type(key) is not str:
        return False
    return (
        isinstance(value, TensorRef) or key.endswith("_extra_state") or ("." in key and not _is_branch(value))
    )


def _holds_weights(value: Any, seen: set[int]) -> bool:
    tensors = (node for node in iter_nodes(value, seen) if isinstance(node, TensorRef))
    return any(tensor.dtype.name not in _COUNTERS for tensor in tensors)
