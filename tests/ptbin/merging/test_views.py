"""Views say what numpy says of the same operations, and show each element that they are said to show once."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator

import numpy
import pytest
from numpy.typing import NDArray

from ptbin.errors import CorruptArchiveError
from ptbin.merging.coverage import prove_used
from ptbin.merging.views import View, concatenated, leaf, stacked, view_of
from ptbin.values.dtypes import BY_NAME
from ptbin.values.tensors import ByteRange, Joined, Storage, TensorRef, dense_strides

INT64 = BY_NAME["int64"]
Arrays = dict[str, NDArray[numpy.int64]]


class _UnprovenError(Exception):
    pass


@contextlib.contextmanager
def _telling_unproven() -> Iterator[None]:
    try:
        yield
    except CorruptArchiveError as error:
        if "cannot be proven" in str(error):
            raise _UnprovenError from error
        raise


def _elements(view: View, arrays: Arrays) -> NDArray[numpy.int64]:
    """What a view shows, box by box."""
    found = numpy.full(view.shape, -1)
    for box in view.boxes:
        flat = arrays[box.part.home].reshape(-1)[box.offset :]
        where = tuple(slice(start, start + n) for start, n in zip(box.start, box.shape, strict=True))
        assert (found[where] == -1).all()
        steps = [8 * step for step in box.stride]
        found[where] = numpy.lib.stride_tricks.as_strided(flat, box.shape, steps)
    return found


def _divisor(n: int, rng: random.Random) -> int:
    return rng.choice([k for k in range(1, n + 1) if n % k == 0])


def _step(view: View, array: NDArray[numpy.int64], rng: random.Random) -> tuple[View, NDArray[numpy.int64]]:
    """One operation, made on both."""
    axis = rng.randrange(len(view.shape))
    kind = rng.choice(["split", "order", "merge", "reshape"])
    if kind == "split":
        inner = _divisor(view.shape[axis], rng)
        halves = (view.shape[axis] // inner, inner)
        return view.split(axis, halves), array.reshape(*array.shape[:axis], *halves, *array.shape[axis + 1 :])
    if kind == "order":
        axes = rng.sample(range(len(view.shape)), len(view.shape))
        return view.ordered(axes), array.transpose(axes)
    if kind == "merge" and axis + 1 < len(view.shape):
        return view.merged(axis), array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
    sizes: tuple[int, ...] = ()
    rest = math.prod(view.shape)
    for _ in range(rng.randrange(3)):
        size = _divisor(rest, rng)
        sizes, rest = (*sizes, size), rest // size
    return view.reshaped((*sizes, rest)), array.reshape(*sizes, rest)


@pytest.mark.parametrize("seed", range(300))
def test_a_view_is_what_numpy_makes_of_it_and_uses_everything_once(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.choice([1, 2, 3, 4, 6, 8]) for _ in range(rng.randint(1, 3)))
    numel = math.prod(shape)
    arrays: Arrays = {k: numpy.arange(i * numel, (i + 1) * numel).reshape(shape) for i, k in enumerate("ab")}
    leaves = [leaf(TensorRef(Storage(k, 8 * numel), INT64, shape, dense_strides(shape)), k) for k in arrays]
    axis = rng.randrange(len(shape))
    if rng.random() < 0.5:
        view, array = concatenated(leaves, axis), numpy.concatenate(list(arrays.values()), axis)
    else:
        view, array = stacked(leaves, axis), numpy.stack(list(arrays.values()), axis)
    for _ in range(rng.randint(1, 4)):
        view, array = _step(view, array, rng)
        assert view.shape == array.shape
    assert (_elements(view, arrays) == array).all()
    axis = rng.randrange(len(view.shape))
    first = rng.randint(0, view.shape[axis])
    halves = [view.taken(axis, 0, first), view.taken(axis, first, view.shape[axis] - first)]
    assert (_elements(halves[1], arrays) == numpy.split(array, [first], axis)[1]).all()
    for home in arrays:
        shown = [
            (box.offset, box.shape, box.stride)
            for half in halves
            for box in half.boxes
            if box.part.home == home and 0 not in box.shape
        ]
        # Sizes that share no factor are refused, never passed.
        with contextlib.suppress(_UnprovenError), _telling_unproven():
            prove_used("it", numel, shown)


@pytest.mark.parametrize(
    "views",
    [
        [(0, (2, 4), (8, 1)), (4, (2, 3), (8, 1))],
        [(0, (2, 4), (8, 1)), (3, (2, 4), (8, 1))],
        [(0, (8,), (1,)), (4, (8,), (1,))],
        [(0, (16,), (1,)), (0, (16,), (1,))],
    ],
)
def test_what_is_left_out_or_shown_twice_is_noticed(
    views: list[tuple[int, tuple[int, ...], tuple[int, ...]]],
) -> None:
    with pytest.raises(CorruptArchiveError):
        prove_used("it", 16, views)


def test_columns_cut_in_two_are_used_once() -> None:
    prove_used("it", 16, [(0, (2, 4), (8, 1)), (4, (2, 4), (8, 1))])


@pytest.mark.parametrize("seed", range(50))
def test_a_flat_run_is_as_many_boxes_as_it_takes(seed: int) -> None:
    """ZeRO cuts its partitions wherever they fall."""
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4)))
    numel = math.prod(shape)
    cuts = sorted(rng.randint(0, numel) for _ in range(3))
    bounds = [0, *cuts, numel]
    pieces = [ByteRange(8 * a, 8 * (b - a)) for a, b in itertools.pairwise(bounds)]
    storage = Storage("x", 8 * numel, Joined(tuple(pieces)))
    view = view_of(TensorRef(storage, INT64, shape, dense_strides(shape)), "x")
    found = numpy.full(shape, -1)
    for box in view.boxes:
        place = box.part.tensor.storage.place
        assert isinstance(place, ByteRange)
        where = tuple(slice(start, start + n) for start, n in zip(box.start, box.shape, strict=True))
        flat = numpy.arange(place.offset // 8, (place.offset + place.nbytes) // 8)[box.offset :]
        steps = [8 * step for step in box.stride]
        found[where] = numpy.lib.stride_tricks.as_strided(flat, box.shape, steps)
    assert (found.reshape(-1) == numpy.arange(numel)).all()
