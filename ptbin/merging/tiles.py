"""From the boxes that a tensor lies in to one place: a range, ranges one behind the other, or tiles. Pure.

Long runs become `Joined` ranges, which a store copies by itself; short ones, the rows of a matrix that is cut
along its columns, stay `Tiled` and are assembled in memory, a slab at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ptbin.errors import UnsupportedTensorError
from ptbin.merging.coverage import prove_cover
from ptbin.values.dtypes import DType
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
    part_of,
)

__all__ = ["Box", "Part", "require_plain", "tile_of", "whole_tensor"]

MIN_RUN_NBYTES = 1 << 20
"""Runs below that are read together: each range of a `Joined` is a request or a system call by itself, and
its CRC-32 has to be combined, which takes as long as that of 100 KB.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of one file that is a piece of a whole, or all of it.

    Attributes:
        tensor: the piece, its place in the address space of all files.
        home: name of the file.
    """

    tensor: TensorRef
    home: str

    @property
    def form(self) -> str:
        """Type and shape, for messages."""
        return f"{self.tensor.dtype.name} {list(self.tensor.shape)}"


@dataclass(frozen=True, slots=True)
class Box:
    """A view of a part and where in the whole it goes.

    Attributes:
        start: in the whole, in elements.
        shape: extent, in elements.
        offset: first element of the view, counted from the part's first one in its storage.
        stride: of the view in the part's storage, in elements.
    """

    part: Part
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]


def require_plain(part: Part, name: str) -> None:
    """Refuse a tensor that is more than bytes in order.

    Raises:
        UnsupportedTensorError: quantized, lazily conjugated, compressed, big-endian.
    """
    tensor = part.tensor
    plain = tensor.quantizer is None and not tensor.flags and tensor.dtype.per_unit == 1
    if not plain or tensor.attributes:
        what = "quantized or lazily conjugated"
    elif tensor.storage.big_endian and tensor.dtype.swap_nbytes > 1:
        what = "stored big-endian"
    elif not isinstance(tensor.storage.place, (ByteRange, InMemory)):
        what = "stored compressed; unpack the archive and pack it uncompressed"
    else:
        return
    raise UnsupportedTensorError(f"{part.home}: {name[:200]!r} is a piece of a tensor and {what}")


def whole_tensor(
    what: str,
    key: str,
    dtype: DType,
    shape: tuple[int, ...],
    boxes: Sequence[Box],
    *,
    final_shape: tuple[int, ...] | None = None,
    known: dict[object, Storage] | None = None,
    own_storage: bool = False,
    keep_records: bool = False,
) -> TensorRef:
    """The tensor that the boxes fill, over a new storage, or over the only box's where that is all.

    Args:
        what: for messages.
        key: name of the new storage.
        shape: the space that boxes are given in.
        final_shape: the tensor's own shape where it differs: as many elements, in the same order.
        own_storage: a view of a part gets a new storage.
        keep_records: do not cut parts into runs, for which their CRC-32s do not vouch.
        known: storages made before, by what they are made of: tensors that are tied in all files stay tied.

    Raises:
        CorruptArchiveError: the boxes overlap or leave gaps.
    """
    boxes = [box for box in boxes if 0 not in box.shape]
    prove_cover(what, shape, [(box.start, box.shape) for box in boxes])
    own = shape if final_shape is None else final_shape
    assert math.prod(own) == math.prod(shape)
    if 0 in shape:
        return TensorRef(Storage(key, 0, InMemory(b"")), dtype, own, dense_strides(own))
    if len(boxes) == 1 and own == shape and (not own_storage or _is_all(boxes[0])):
        tensor = boxes[0].part.tensor
        return TensorRef(tensor.storage, dtype, own, boxes[0].stride, tensor.storage_offset + boxes[0].offset)
    made_of = (shape, *((_identity(b.part.tensor.storage), *_layout(b)) for b in boxes))
    if known is not None and (storage := known.get(made_of)) is not None:
        return TensorRef(storage, dtype, own, dense_strides(own))
    place = _joined(shape, dtype.itemsize, boxes, keep_records=keep_records) or Tiled(
        shape, dtype.itemsize, tuple(tile_of(box) for box in boxes)
    )
    storage = Storage(key, math.prod(shape) * dtype.itemsize, place)
    assert place.nbytes == storage.nbytes
    if known is not None:
        known[made_of] = storage
    return TensorRef(storage, dtype, own, dense_strides(own))


def _is_all(box: Box) -> bool:
    """Whether the box is its part as it lies."""
    tensor = box.part.tensor
    return (box.offset, box.shape, box.stride) == (0, tensor.shape, tensor.stride)


def _identity(storage: Storage) -> object:
    """What two boxes of the same bytes share. Not the storage itself: views make some that do not last, and
    Python gives the identity of one that is gone to the next.
    """
    place = storage.place
    return id(place.data) if isinstance(place, InMemory) else place


def _layout(box: Box) -> tuple[object, ...]:
    return (box.part.tensor.storage_offset + box.offset, box.stride, box.start, box.shape)


def tile_of(box: Box) -> Tile:
    """The box as a tile of its part's storage."""
    tensor = box.part.tensor
    place = tensor.storage.place
    assert isinstance(place, (ByteRange, InMemory))
    offset = (tensor.storage_offset + box.offset) * tensor.dtype.itemsize
    return Tile(box.start, box.shape, place, offset, box.stride)


def _joined(
    shape: tuple[int, ...], itemsize: int, boxes: Sequence[Box], *, keep_records: bool
) -> Place | None:
    """The runs of all boxes in the whole's order; None where they are short.

    Also where a part does not fill its storage (a view, padding): the storage's CRC-32 and the accounting
    speak of all of it, which a tile can say.
    """
    if not all(_fills_storage(box.part.tensor) for box in boxes):
        return None
    split = [_run_axis(shape, box) for box in boxes]
    runs = [math.prod(box.shape[axis:]) * itemsize for box, axis in zip(boxes, split, strict=True)]
    several = any(math.prod(box.shape[:axis]) > 1 for box, axis in zip(boxes, split, strict=True))
    if several and (keep_records or min(runs) < MIN_RUN_NBYTES):
        return None
    found: list[tuple[int, ByteRange | InMemory]] = []
    for box, axis, nbytes in zip(boxes, split, runs, strict=True):
        found.extend(_runs(shape, itemsize, box, axis, nbytes))
    found.sort(key=lambda run: run[0])
    places = tuple(place for _, place in found)
    return places[0] if len(places) == 1 else Joined(places)


def _fills_storage(tensor: TensorRef) -> bool:
    place = tensor.storage.place
    assert isinstance(place, (ByteRange, InMemory))
    return tensor.dense and tensor.nbytes == place.nbytes and isinstance(place, ByteRange)


def _run_axis(shape: tuple[int, ...], box: Box) -> int:
    """The first axis from which on the box is one run, both in the whole and in its part."""
    step = 1
    axis = len(shape)
    while axis > 0:
        extent = box.shape[axis - 1]
        if extent != 1 and box.stride[axis - 1] != step:
            break
        step *= extent
        axis -= 1
        if extent != shape[axis]:
            break
    return axis


def _runs(
    shape: tuple[int, ...], itemsize: int, box: Box, axis: int, nbytes: int
) -> Iterator[tuple[int, ByteRange | InMemory]]:
    """(element of the whole, place) of each run of a box."""
    dense = dense_strides(shape)
    tensor = box.part.tensor
    place = tensor.storage.place
    assert isinstance(place, ByteRange)
    first = sum(start * step for start, step in zip(box.start, dense, strict=True))
    for index in product(*(range(n) for n in box.shape[:axis])):
        to = first + sum(i * step for i, step in zip(index, dense, strict=False))
        at = box.offset + sum(i * step for i, step in zip(index, box.stride, strict=False))
        yield to, part_of(place, (tensor.storage_offset + at) * itemsize, nbytes)
