"""safetensors files: a JSON header of names, types, shapes and offsets, and the bytes behind it.

Held to the format's own rules (safetensors' README and `Metadata::validate`): a header of at most 100 MB that
begins with `{`, data that the tensors fill from the first byte to the last without hole or overlap.
"""

from __future__ import annotations

import json
import math
from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError, UnsupportedTensorError
from ptbin.reading.containers.checkpoint import Checkpoint, Opening
from ptbin.values.dtypes import BY_NAME, PAIRED, SAFETENSORS_NAMES
from ptbin.values.nodes import DictNode, sizes_in
from ptbin.values.tensors import ByteRange, Storage, TensorRef, dense_strides

MAX_HEADER_NBYTES = 100_000_000

_DTYPES = {short: BY_NAME[name] for name, short in SAFETENSORS_NAMES.items()}


def looks_like_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 9 and head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size


def read_safetensors(opening: Opening) -> Checkpoint | None:
    """Index a safetensors file; None where it does not begin as one.

    Raises:
        CorruptArchiveError: the header breaks a rule of the format.
        UnsupportedTensorError: an element type that torch has not.
    """
    file = opening.file
    head = file.head(512)
    if not looks_like_safetensors(head, file.size):
        return None
    header_nbytes = int.from_bytes(head[:8], "little")
    if header_nbytes > min(MAX_HEADER_NBYTES, opening.limits.pickle_nbytes):
        limit = "pickle_nbytes" if header_nbytes <= MAX_HEADER_NBYTES else ""
        raise LimitExceededError(f"{file.uri}: a header of {header_nbytes} bytes", limit=limit)
    try:
        header = json.loads(file.read(8, header_nbytes, "header"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptArchiveError(f"{file.uri}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CorruptArchiveError(f"{file.uri}: the header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    start = 8 + header_nbytes
    root = DictNode("OrderedDict")
    storages: dict[str, Storage] = {}
    # A header lists tensors in any order; the data's order is the file's.
    found = [(name, *_tensor(file.uri, name, row, start)) for name, row in header.items()]
    for name, tensor, _ in sorted(found, key=lambda item: item[2]):
        storages[name] = tensor.storage
        root.pairs.append((name, tensor))
    _refuse_holes(file.uri, storages, start, file.size)
    named = root.by_name()
    if isinstance(metadata, dict):
        # safetensors.torch.save_model stores one of several tied tensors, and the others' names here
        for name, kept in metadata.items():
            if isinstance(kept, str) and kept in named and name not in named:
                root.pairs.append((name, named[kept]))
    texts = {name: text for name, text in (metadata or {}).items() if isinstance(text, str)}
    return opening.build("safetensors", root, storages, metadata=texts)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _tensor(uri: str, name: str, row: Any, start: int) -> tuple[TensorRef, int]:
    row = row if isinstance(row, dict) else {}
    shape, offsets = sizes_in(row.get("shape")), sizes_in(row.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise CorruptArchiveError(f"{uri}: the header gives {name[:200]!r} no shape or no range of bytes")
    dtype = _DTYPES.get(row.get("dtype"))
    if dtype is None:
        raise UnsupportedTensorError(f"{uri}: {name!r} has element type {str(row.get('dtype'))[:40]!r}")
    if row["dtype"] == PAIRED:  # two numbers of the format's are one of torch's
        if not shape or shape[-1] % 2:
            raise UnsupportedTensorError(
                f"{uri}: {name!r} is an odd number of 4-bit numbers; torch keeps pairs"
            )
        shape = (*shape[:-1], shape[-1] // 2)
    nbytes = dtype.nbytes_of(math.prod(shape))
    if offsets[1] - offsets[0] != nbytes:
        raise CorruptArchiveError(
            f"{uri}: {name!r} should take {nbytes} bytes, the header gives it {offsets[1] - offsets[0]}"
        )
    storage = Storage(name, nbytes, ByteRange(start + offsets[0], nbytes, member=f"tensor {name!r}"))
    return TensorRef(storage, dtype, shape, dense_strides(shape)), offsets[0]


def _refuse_holes(uri: str, storages: dict[str, Storage], start: int, size: int) -> None:
    end = start
    ranges = sorted(
        (s.place.offset, s.place.nbytes) for s in storages.values() if isinstance(s.place, ByteRange)
    )
    for offset, nbytes in ranges:
        if offset != end:
            raise CorruptArchiveError(f"{uri}: the tensors leave a hole or overlap at byte {offset}")
        end += nbytes
    if end != size:
        raise CorruptArchiveError(
            f"{uri}: the tensors should end at byte {end}, the file at {size}; is it truncated?"
        )
