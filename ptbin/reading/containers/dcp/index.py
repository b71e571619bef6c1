"""The index of a `torch.distributed.checkpoint` folder: what `.metadata` says, checked.

For each flattened name the whole tensor's type, size and chunks (boxes), where each chunk's bytes are (file,
offset, length), and the path that the name had before it was flattened. Everything is checked against itself
and against the files that are there. Sources: torch/distributed/checkpoint/metadata.py, planner_helpers.py,
2.13.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ptbin.errors import (
    CorruptArchiveError,
    IncompleteCheckpointError,
    LimitExceededError,
    UnsupportedFormatError,
)
from ptbin.merging.coverage import prove_cover
from ptbin.options import Limits
from ptbin.sources.folders import DCP_METADATA
from ptbin.stores.joined import JoinedReader
from ptbin.values.dtypes import DType, dtype_by_name
from ptbin.values.nodes import DictNode, Global, Instance, Opaque, sizes_in

MAX_PATH = 64
"""Steps of a path to an entry; `state_dict.MAX_DEPTH` looks no deeper than half of it."""

MAX_NAME = 1 << 16

_METADATA_CLASSES = "torch.distributed.checkpoint.metadata."
_METADATA = (
    _METADATA_CLASSES + "Metadata",
    # megatron-core 0.14 and 0.15, with the same attributes and more
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
)
_CHUNK_FILE = re.compile(r"^__\d+_\d+\.distcp$")


@dataclass(frozen=True, slots=True)
class Span:
    """Where one chunk or object was written: `offset` within the folder's address space."""

    offset: int
    nbytes: int
    file: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """One box of a tensor, in elements, and its bytes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    span: Span


@dataclass(slots=True)
class Entry:
    """One flattened name: a tensor (`dtype` set) with its non-empty chunks, or an object in one span."""

    name: str
    path: tuple[str | int, ...]
    dtype: DType | None = None
    shape: tuple[int, ...] = ()
    chunks: list[Chunk] = field(default_factory=list)
    span: Span | None = None
    opaque: Opaque | None = None


def entries_of(reader: JoinedReader, root: Any, limits: Limits) -> list[Entry]:
    """Every name of a `Metadata` record, in the order of the state dict where the index has kept it.

    Raises:
        CorruptArchiveError: chunks that overlap, leave gaps, or lie outside of their file.
        IncompleteCheckpointError: files that are missing.
        UnsupportedFormatError: chunks written through an extension (compression).
        LimitExceededError: more than the limits allow.
    """
    return _Index(reader, root, limits).entries()


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
        # Custom planners keep other things there.
        self._paths = paths.by_name() if isinstance(paths, DictNode) else {}
        self._count = 0

    def entries(self) -> list[Entry]:
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
            raise CorruptArchiveError(f"{self.uri}: {what} is not a mapping")
        return value

    def _spans(self) -> dict[tuple[str, tuple[int, ...] | None], Span]:
        found: dict[tuple[str, tuple[int, ...] | None], Span] = {}
        for key, value in self._storage.pairs:
            index, info = _state(key), _state(value)
            name = index.get("fqn") if index is not None else None
            if index is None or info is None or not isinstance(name, str):
                raise CorruptArchiveError(f"{self.uri}: storage_data has an entry that is not storage info")
            if info.get("transform_descriptors"):
                raise UnsupportedFormatError(
                    f"{self.uri}: {name[:200]!r} was written through an extension (compression, say); load "
                    "the folder with torch.distributed.checkpoint and save it again without `_extensions`"
                )
            offset = index.get("offset")
            found[name, None if offset is None else self._ints(offset, name)] = self._span(name, info)
        return found

    def _span(self, name: str, info: DictNode) -> Span:
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
        return Span(part.base + offset, nbytes, file)

    def _entry(
        self, name: str, described: Any, spans: dict[tuple[str, tuple[int, ...] | None], Span]
    ) -> Entry:
        entry = Entry(name, self._path(name))
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
            entry.opaque = Opaque("tensor", "ptbin does not know its element type")
            return entry
        chunks = state.get("chunks")
        if not isinstance(chunks, list):
            raise CorruptArchiveError(f"{self.uri}: {name[:200]!r} has no list of chunks")
        entry.chunks = self._chunks(entry, chunks, spans)
        return entry

    def _chunks(
        self, entry: Entry, described: list[Any], spans: dict[tuple[str, tuple[int, ...] | None], Span]
    ) -> list[Chunk]:
        """The non-empty chunks in row-major order, each once: ranks that hold the same may both list it."""
        self._count += len(described)
        if self._count > self._limits.tensors:
            raise LimitExceededError(f"{self.uri}: more than {self._limits.tensors} chunks", limit="tensors")
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
        if len(ordered) < 2:  # several are proven where they are put together
            prove_cover(f"{self.uri}: the chunks of {entry.name[:200]!r}", entry.shape, ordered)
        chunks = []
        for start, shape in ordered:
            span = spans.get((entry.name, start))
            if span is None:
                raise CorruptArchiveError(
                    f"{self.uri}: nothing says where the chunk of {entry.name[:200]!r} "
                    f"at {list(start)} is stored"
                )
            chunks.append(Chunk(start, shape, span))
        return chunks

    def _path(self, name: str) -> tuple[str | int, ...]:
        path = self._paths.get(name, (name,))
        if not isinstance(path, tuple) or not path or not all(type(step) in (str, int) for step in path[:64]):
            raise CorruptArchiveError(f"{self.uri}: {name[:200]!r} has no usable path")
        if len(path) > MAX_PATH:
            raise LimitExceededError(f"{self.uri}: {name[:200]!r} lies {len(path)} levels deep")
        return path

    def _ints(self, value: Any, name: str) -> tuple[int, ...]:
        if (sizes := sizes_in(value)) is None:
            raise CorruptArchiveError(f"{self.uri}: {name[:200]!r} has sizes or offsets that are not numbers")
        return sizes


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
