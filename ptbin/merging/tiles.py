"""From the boxes that a tensor lies in to one place: a range, ranges one behind the other, or tiles. Pure.

Parts that each lie in one run become `Joined` ranges, which a store copies by itself. Those that are cut into
runs, the rows of a matrix that is divided along its columns, stay `Tiled` and are assembled in memory, a slab
at a time: the CRC-32 that an archive states is one of a whole part.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

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
) -> TensorRef:
    """The tensor that the boxes fill, over a new storage, or over the only box's where that is all.

    Args:
        what: for messages.
        key: name of the new storage.
        shape: the space that boxes are given in.
        final_shape: the tensor's own shape where it differs: as many elements, in the same order.
        own_storage: a view of a part gets a new storage.
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
    place = _joined(shape, boxes) or Tiled(shape, dtype.itemsize, tuple(_tile_of(box) for box in boxes))
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


def _tile_of(box: Box) -> Tile:
    """The box as a tile of its part's storage."""
    tensor = box.part.tensor
    place = tensor.storage.place
    assert isinstance(place, (ByteRange, InMemory))
    offset = (tensor.storage_offset + box.offset) * tensor.dtype.itemsize
    return Tile(box.start, box.shape, place, offset, box.stride)


def _joined(shape: tuple[int, ...], boxes: Sequence[Box]) -> Place | None:
    """The parts in the whole's order; None where one of them is not a single run there.

    Also where a part does not fill its storage (a view, padding): the storage's CRC-32 and the accounting
    speak of all of it, which a tile can say.
    """
    if not all(_fills_storage(box.part.tensor) and _is_one_run(shape, box) for box in boxes):
        return None
    dense = dense_strides(shape)
    in_order = sorted(boxes, key=lambda box: sum(map(operator.mul, box.start, dense)))
    places = tuple(map(_bytes_of, in_order))
    return places[0] if len(places) == 1 else Joined(places)


def _bytes_of(box: Box) -> ByteRange | InMemory:
    """Where a box of a single run lies."""
    tensor = box.part.tensor
    place, itemsize = tensor.storage.place, tensor.dtype.itemsize
    assert isinstance(place, ByteRange)
    return part_of(place, (tensor.storage_offset + box.offset) * itemsize, math.prod(box.shape) * itemsize)


def _fills_storage(tensor: TensorRef) -> bool:
    place = tensor.storage.place
    assert isinstance(place, (ByteRange, InMemory))
    return tensor.dense and tensor.nbytes == place.nbytes and isinstance(place, ByteRange)


def _is_one_run(shape: tuple[int, ...], box: Box) -> bool:
    """Whether the box's elements lie one behind the other, both in the whole and in its part."""
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
    return math.prod(box.shape[:axis]) == 1
