"""torch's Hugging Face shards: `shard-00001-model-00001-of-00001.safetensors`, a file or more for each rank.

`HuggingFaceStorageWriter(save_distributed=True)` of torch.distributed.checkpoint writes them (torchtitan,
NeMo Automodel). `DCP_SHARDING_INFO` in each header says where in the whole each tensor begins. Nothing says
how long the whole is, nor how many files there are: tensors reach as far as the pieces do, as in torch's own
`_consolidate_hf_safetensors`, and here without gaps. That the last file is there is shown by a tensor whose
last piece is shorter than `torch.chunk` over more ranks would make it, or by an extent that is also one
across the cut (a norm as long as matrices are wide: a lost file takes the same share of every tensor).

Costs: the header of each file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ptbin.errors import CorruptArchiveError
from ptbin.merging.tiles import Box, Part
from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.part_files import PartFiles, Pieces
from ptbin.values.nodes import DictNode, sizes_in
from ptbin.values.tensors import TensorRef

SHARDING_INFO = "DCP_SHARDING_INFO"

MAX_SHARDING_NBYTES = 64 << 20
_SHARD = re.compile(r"^shard-(?P<n>\d{5})-model-(?P<rest>\d{5}-of-\d{5}\.safetensors)$")


@dataclass(slots=True)
class _Whole:
    """What is known of one tensor: its pieces, and how far they reach."""

    pieces: list[Box]
    shape: tuple[int, ...]


def read_hf_shards(folder: Folder) -> Checkpoint:
    """Index the files of all ranks.

    Raises:
        IncompleteCheckpointError: a file is missing, or nothing shows that the last one is there.
        CorruptArchiveError: pieces overlap, or are not where the header says.
    """
    files = PartFiles(folder)
    names = sorted(folder.reader.names)
    numbers = sorted({_number(name) for name in names})
    absent = [number for number in range(1, numbers[-1]) if number not in numbers]
    if absent:
        files.refuse(f"{_named(names[0], absent[0])} is missing ({len(absent)} of {numbers[-1]}); fetch it")
    found: dict[str, _Whole] = {}
    for name in names:
        checkpoint = files.open(name)
        offsets = _offsets(files, name, checkpoint)
        for key, tensor in _tensors(files, name, checkpoint.root):
            start = offsets.get(key)
            if start is None or len(start) != len(tensor.shape):
                files.refuse(f"{name}: {SHARDING_INFO} does not say where in the whole {key[:200]!r} begins")
            box = Box(Part(tensor, name), start, tensor.shape, 0, tensor.stride)
            whole = found.setdefault(key, _Whole([], (0,) * len(start)))
            first = whole.pieces[0].part.tensor if whole.pieces else tensor
            if (len(first.shape), first.dtype) != (len(tensor.shape), tensor.dtype):
                files.refuse(
                    f"{key[:200]!r} is of another type in {name} than in {whole.pieces[0].part.home}"
                )
            whole.pieces.append(box)
            whole.shape = tuple(
                max(end, at + n) for end, at, n in zip(whole.shape, start, tensor.shape, strict=True)
            )
    _refuse_unproven(files, found, names, numbers[-1], taken=folder.parts)
    root = DictNode("OrderedDict", [(key, _made(files, key, whole)) for key, whole in found.items()])
    return files.checkpoint("hf_shards", root)


def _named(like: str, number: int) -> str:
    match = _SHARD.match(like)
    return f"shard-{number:05d}-model-{match['rest'] if match else '00001-of-00001.safetensors'}"


def _number(name: str) -> int:
    match = _SHARD.match(name)
    return int(match["n"]) if match else 0


def _tensors(files: PartFiles, name: str, root: Any) -> Iterator[tuple[str, TensorRef]]:
    for key, value in root.pairs if isinstance(root, DictNode) else ():
        if not isinstance(value, TensorRef):
            raise CorruptArchiveError(f"{files.uri}: {name} holds something that is not a tensor")
        yield key, value


def _offsets(files: PartFiles, name: str, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Where in its whole each tensor of a file begins."""
    try:
        found = sharding_offsets(checkpoint)
    except ValueError as error:
        raise CorruptArchiveError(f"{files.uri}: {name}: {SHARDING_INFO} is not JSON: {error}") from error
    if found is None:
        files.refuse(f"{name} has no {SHARDING_INFO}: nothing says where its tensors lie in the whole")
    return found


def sharding_offsets(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]] | None:
    """Where in its whole each tensor of a safetensors file begins; None where the file does not say.

    Raises:
        ValueError: it says so in something that is not JSON.
    """
    text = checkpoint.metadata.get(SHARDING_INFO)
    if text is None or len(text) > MAX_SHARDING_NBYTES:
        return None
    try:
        stated = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    rows = stated.items() if isinstance(stated, dict) else ()
    offsets = {name: sizes_in(row.get("saved_offsets")) for name, row in rows if isinstance(row, dict)}
    return {name: sizes for name, sizes in offsets.items() if sizes is not None}


def _made(files: PartFiles, key: str, whole: _Whole) -> TensorRef:
    pieces: Pieces = {}
    for box in whole.pieces:
        pieces.setdefault(((box.start, box.shape),), []).append([box])
    try:
        return files.assemble(key, whole.pieces[0].part.tensor.dtype, whole.shape, pieces)
    except CorruptArchiveError as error:
        homes = ", ".join(sorted({box.part.home for box in whole.pieces})[:3])
        files.refuse(f"{str(error)[len(files.uri) + 2 :]} (in {homes}); fetch all files of this save")


# -- whether the last file is there ------------------------------------------------------------------------


def _refuse_unproven(
    files: PartFiles, found: dict[str, _Whole], names: list[str], ranks: int, *, taken: bool
) -> None:
    cut = {key: axis for key, whole in found.items() if (axis := _cut_axis(whole)) is not None}
    if ranks == 1:
        cut = {key: 0 for key, whole in found.items() if whole.shape}
    if taken or any(_proves(found[key], axis, ranks) for key, axis in cut.items()):
        return
    across = {
        extent
        for key, whole in found.items()
        for axis, extent in enumerate(whole.shape)
        if len(whole.shape) > 1 and axis != cut.get(key)
    }
    # Those that the last file has a piece of: they would be longer if there were another.
    last = [key for key in cut if any(_number(box.part.home) == ranks for box in found[key].pieces)]
    norms = [key for key in last if len(found[key].shape) == 1 and key.endswith(".weight")]
    told = norms or [key for key in last if len(found[key].shape) > 1]
    if any(found[key].shape[cut[key]] in across for key in told):
        return
    files.refuse(
        f"nothing shows that {names[-1]} is the last file: if {_named(names[0], ranks + 1)} is "
        "missing, fetch it; if "
        "these are all, take them with --parts"
    )


def _cut_axis(whole: _Whole) -> int | None:
    """The one dimension that a tensor is cut along; None where there are several or none."""
    axes = {
        axis
        for box in whole.pieces
        for axis, (at, n) in enumerate(zip(box.start, box.shape, strict=True))
        if at or n != whole.shape[axis]
    }
    return axes.pop() if len(axes) == 1 else None


def _proves(whole: _Whole, axis: int, ranks: int) -> bool:
    """Whether the last piece is short, and no more ranks than there are would make it so (`torch.chunk`)."""
    pieces = sorted({(box.start[axis], box.shape[axis]) for box in whole.pieces if 0 not in box.shape})
    most, last, size = pieces[0][1], pieces[-1][1], whole.shape[axis]
    return last < most and -(-size // ranks) == most and -(-size // (ranks + 1)) < most
