"""Tensors made of views of other tensors: split, reordered, cut, stacked, concatenated, without any bytes.

A `View` is a shape and the boxes that fill it, each a strided view of a part. Every operation moves boxes
around; none computes. `View.tensor` proves that they fill the shape and makes the place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ptbin.errors import LimitExceededError, UnsupportedTensorError
from ptbin.merging.tiles import Box, Part, require_plain, whole_tensor
from ptbin.values.dtypes import DType
from ptbin.values.tensors import ByteRange, InMemory, Joined, Storage, TensorRef, Tiled, dense_strides

MAX_BOXES = 1 << 20


@dataclass(frozen=True, slots=True)
class View:
    """Elements of other tensors, reordered.

    Attributes:
        final_shape: the shape of the result, with the same elements in the same order; None: `shape`.
    """

    dtype: DType
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    final_shape: tuple[int, ...] | None = None

    def tensor(self, what: str, key: str, known: dict[object, Storage] | None = None) -> TensorRef:
        """The tensor. Raises CorruptArchiveError: the boxes overlap or leave gaps."""
        return whole_tensor(
            what,
            key,
            self.dtype,
            self.shape,
            self.boxes,
            final_shape=self.final_shape,
            known=known,
            own_storage=True,
        )

    def in_final_shape(self) -> View:
        """With `final_shape` as its shape."""
        return (
            self if self.final_shape is None else replace(self, final_shape=None).reshaped(self.final_shape)
        )

    def split(self, axis: int, sizes: Sequence[int]) -> View:
        """One axis as several, the last one fastest."""
        assert math.prod(sizes) == self.shape[axis]
        view = self
        for size in reversed(sizes[1:]):
            view = view._halved(axis, size)
        return view

    def _halved(self, axis: int, size: int) -> View:
        """An axis of n as two, of n / size and size."""
        shape = (*self.shape[:axis], self.shape[axis] // size, size, *self.shape[axis + 1 :])
        return _made(self.dtype, shape, (new for box in self.boxes for new in _cut_axis(box, axis, size)))

    def merged(self, axis: int) -> View:
        """An axis and the one behind it as one."""
        after = self.shape[axis + 1]
        shape = (*self.shape[:axis], self.shape[axis] * after, *self.shape[axis + 2 :])
        return _made(self.dtype, shape, (new for box in self.boxes for new in _join_axes(box, axis, after)))

    def reshaped(self, shape: tuple[int, ...]) -> View:
        """The same elements in the same order; axes are merged and split where they have to be."""
        assert math.prod(shape) == math.prod(self.shape)
        if not math.prod(shape):
            return View(self.dtype, shape, ())
        view = self
        for axis in reversed(range(len(view.shape))):  # axes of one say nothing
            view = view.at(axis, 0) if view.shape[axis] == 1 else view
        wanted = tuple(n for n in shape if n != 1)
        axis = done = 0
        while done < len(wanted):
            # The next axes of both with the same product.
            end, last = axis + 1, done + 1
            while (have := math.prod(view.shape[axis:end])) != (want := math.prod(wanted[done:last])):
                end, last = (end + 1, last) if have < want else (end, last + 1)
            if view.shape[axis:end] != wanted[done:last]:
                for _ in range(end - axis - 1):
                    view = view.merged(axis)
                view = view.split(axis, wanted[done:last])
            axis = done = last
        for axis, n in enumerate(shape):
            view = view.with_axis(axis) if n == 1 else view
        return view

    def rearranged(self, change: Callable[[tuple[int, ...], int], tuple[int, ...]]) -> View:
        """Its axes changed as `change` does it to numbers, one for each; a new axis gets the one given."""
        boxes = (
            replace(box, start=change(box.start, 0), shape=change(box.shape, 1), stride=change(box.stride, 1))
            for box in self.boxes
        )
        return View(self.dtype, change(self.shape, 1), tuple(boxes))

    def with_axis(self, axis: int) -> View:
        """With one more axis, of one."""
        return self.rearranged(lambda values, new: (*values[:axis], new, *values[axis:]))

    def ordered(self, axes: Sequence[int]) -> View:
        """Axes in another order (`torch.permute`)."""
        return self.rearranged(lambda values, _: tuple(values[axis] for axis in axes))

    def taken(self, axis: int, first: int, count: int) -> View:
        """`count` indices of an axis, from `first` on."""
        shape = (*self.shape[:axis], count, *self.shape[axis + 1 :])
        boxes = []
        for box in self.boxes:
            low, high = max(box.start[axis], first), min(box.start[axis] + box.shape[axis], first + count)
            if low < high:
                offset = box.offset + (low - box.start[axis]) * box.stride[axis]
                boxes.append(
                    replace(
                        box,
                        start=_put(box.start, axis, low - first),
                        shape=_put(box.shape, axis, high - low),
                        offset=offset,
                    )
                )
        return View(self.dtype, shape, tuple(boxes))

    def at(self, axis: int, index: int) -> View:
        """One index of an axis, which goes away."""
        taken = self.taken(axis, index, 1)
        return taken.rearranged(lambda values, _: (*values[:axis], *values[axis + 1 :]))


def concatenated(views: Sequence[View], axis: int) -> View:
    """One behind the other along an axis; their other extents and types are the same."""
    boxes: list[Box] = []
    position = 0
    for view in views:
        boxes.extend(
            replace(box, start=_put(box.start, axis, box.start[axis] + position)) for box in view.boxes
        )
        position += view.shape[axis]
    return _made(views[0].dtype, _put(views[0].shape, axis, position), boxes)


def stacked(views: Sequence[View], axis: int) -> View:
    """Along a new axis."""
    return concatenated([view.with_axis(axis) for view in views], axis)


def leaf(tensor: TensorRef, home: str) -> View:
    """The tensor as if it lay densely in a separate storage: for proofs, which need no place."""
    dense = dense_strides(tensor.shape)
    own = TensorRef(Storage(home, tensor.nbytes), tensor.dtype, tensor.shape, dense)
    box = Box(Part(own, home), (0,) * len(tensor.shape), tensor.shape, 0, dense)
    return View(tensor.dtype, tensor.shape, (box,) if tensor.numel else ())


def view_of(tensor: TensorRef, name: str) -> View:
    """The tensor as views of the storages it is stored in.

    Raises:
        UnsupportedTensorError: it is more than bytes in order, or a strided view of what lies in pieces.
    """
    place = tensor.storage.place
    if isinstance(place, (ByteRange, InMemory)) or not isinstance(place, (Joined, Tiled)):
        part = Part(tensor, name)
        require_plain(part, name)
        box = Box(part, (0,) * len(tensor.shape), tensor.shape, 0, tensor.stride)
        return View(tensor.dtype, tensor.shape, (box,) if tensor.numel else ())
    if tensor.quantizer is not None or tensor.flags or tensor.storage.big_endian:
        raise UnsupportedTensorError(f"{name[:200]!r} is quantized, lazily conjugated or stored big-endian")
    if not tensor.contiguous or tensor.storage_offset or tensor.nbytes != place.nbytes:
        raise UnsupportedTensorError(f"{name[:200]!r} is a view of what is stored in pieces")
    if isinstance(place, Joined):
        found: list[Box] = []
        position = 0
        for piece in place.parts:
            count = piece.nbytes // tensor.dtype.itemsize
            flat = TensorRef(Storage(name, piece.nbytes, piece), tensor.dtype, (count,), (1,))
            found.extend(_flat_boxes(Part(flat, name), tensor.shape, position, count))
            position += count
        return View(tensor.dtype, tensor.shape, tuple(found))
    boxes = []
    for tile in place.tiles:
        storage = Storage(name, tile.place.nbytes, tile.place)
        own = TensorRef(storage, tensor.dtype, tile.shape, tile.stride, tile.offset // tensor.dtype.itemsize)
        boxes.append(Box(Part(own, name), tile.start, tile.shape, 0, tile.stride))
    view = View(tensor.dtype, place.shape, tuple(boxes))
    return view if place.shape == tensor.shape else view.reshaped(tensor.shape)


def _flat_boxes(part: Part, shape: tuple[int, ...], first: int, count: int) -> Iterator[Box]:
    """The boxes that a run of elements of a row-major tensor fills, at most two for each dimension."""
    dense = dense_strides(shape)
    at = 0
    while at < count:
        index = first + at
        # The largest block of whole rows that begins here and ends within the run.
        axis = len(shape)
        while axis > 0 and index % (dense[axis - 1] * shape[axis - 1]) == 0:
            if dense[axis - 1] * shape[axis - 1] > count - at:
                break
            axis -= 1
        axis = max(axis - 1, 0)
        while axis < len(shape) - 1 and (index % dense[axis] or dense[axis] > count - at):
            axis += 1
        start = tuple(index // step % n for step, n in zip(dense, shape, strict=True))
        rows = min((count - at) // dense[axis], shape[axis] - start[axis]) if shape else 1
        extent = (*(1,) * axis, rows, *shape[axis + 1 :]) if shape else ()
        yield Box(part, start, extent, at, dense)
        at += math.prod(extent)


def _made(dtype: DType, shape: tuple[int, ...], boxes: Iterator[Box] | Sequence[Box]) -> View:
    found = []
    for box in boxes:
        found.append(box)
        if len(found) > MAX_BOXES:
            raise LimitExceededError(f"a tensor of more than {MAX_BOXES} pieces")
    return View(dtype, shape, tuple(found))


def _cut_axis(box: Box, axis: int, size: int) -> Iterator[Box]:
    """The box with an axis split in two, cut where it does not fill whole rows of the second one."""
    first, end = box.start[axis], box.start[axis] + box.shape[axis]
    step = box.stride[axis]
    position = first
    while position < end:
        row, column = divmod(position, size)
        if column == 0 and end - position >= size:
            rows, columns = (end - position) // size, size
        else:
            rows, columns = 1, min(size - column, end - position)
        yield replace(
            box,
            start=(*box.start[:axis], row, column, *box.start[axis + 1 :]),
            shape=(*box.shape[:axis], rows, columns, *box.shape[axis + 1 :]),
            stride=(*box.stride[:axis], step * size, step, *box.stride[axis + 1 :]),
            offset=box.offset + (position - first) * step,
        )
        position += rows * columns


def _join_axes(box: Box, axis: int, size: int) -> Iterator[Box]:
    """The box with two axes merged, cut into rows where they do not lie one behind the other."""
    (row, column), (rows, columns) = box.start[axis : axis + 2], box.shape[axis : axis + 2]
    far, near = box.stride[axis : axis + 2]
    if rows > 1 and columns == size and (far == size * near or size == 1):
        pieces = [(0, rows * size, far if size == 1 else near)]
    else:
        pieces = [(i, columns, near) for i in range(rows)]
    for i, count, step in pieces:
        yield replace(
            box,
            start=(*box.start[:axis], (row + i) * size + column, *box.start[axis + 2 :]),
            shape=(*box.shape[:axis], count, *box.shape[axis + 2 :]),
            stride=(*box.stride[:axis], step, *box.stride[axis + 2 :]),
            offset=box.offset + i * far,
        )


def _put(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])
