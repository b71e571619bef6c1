"""Tensors as formats without strides hold them: contiguous, in logical order, ties stored once. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ptbin.errors import UnsupportedTensorError
from ptbin.values.dtypes import DType
from ptbin.values.segments import Cast, FilePlan, PlannedTensor, Recipe, Strided, nbytes_of
from ptbin.values.tensors import Joined, SparseTensor, TensorRef, Tiled
from ptbin.writing.casts import Casts
from ptbin.writing.layout import FileContent, FileLayout
from ptbin.writing.storages import slices_of, swapped


@dataclass(frozen=True, eq=False, slots=True)
class DenseTensor:
    """Distinct content of an output and every name it goes by, the first one first."""

    names: tuple[str, ...]
    source: TensorRef
    dtype: DType
    recipes: tuple[Recipe, ...]

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.recipes)


def dense_tensors(file: FileContent, format_name: str) -> list[DenseTensor]:
    """The tensors among the entries; other values are not for these formats.

    Raises:
        UnsupportedTensorError: sparse or quantized tensors, lazy conjugates; only `torch` holds these.
    """
    names: dict[tuple[object, ...], list[str]] = {}
    found: dict[tuple[object, ...], TensorRef] = {}
    for name, value in file.entries:
        if isinstance(value, SparseTensor):
            raise _unsupported(name, "a sparse tensor", format_name)
        if not isinstance(value, TensorRef):
            continue
        if value.quantizer is not None or value.dtype.quantized:
            raise _unsupported(name, "a quantized tensor", format_name)
        if value.flags:
            raise _unsupported(name, "a lazily conjugated or negated tensor", format_name)
        # An empty tensor shares nothing, whatever storage it is a view of.
        key = (*value.layout_key(), name if not value.numel else "")
        found.setdefault(key, value)
        names.setdefault(key, []).append(name)
    return [_dense(tuple(names[key]), tensor, file.casts) for key, tensor in found.items()]


def _unsupported(name: str, what: str, format_name: str) -> UnsupportedTensorError:
    return UnsupportedTensorError(
        f"{name!r} is {what}, which format {format_name} cannot hold; "
        "--format torch can, --drop leaves it out"
    )


def _dense(names: tuple[str, ...], tensor: TensorRef, casts: Casts) -> DenseTensor:
    try:
        recipes = dense_recipes(tensor)
    except UnsupportedTensorError as error:
        raise UnsupportedTensorError(f"{names[0]!r} is {error}") from None
    target = casts.of(tensor)
    if target is not None and recipes:
        recipes = (Cast(recipes, tensor.dtype, target, names[0]),)
    return DenseTensor(names, tensor, target or tensor.dtype, recipes)


def dense_recipes(tensor: TensorRef) -> tuple[Recipe, ...]:
    """A tensor's elements in logical order, little-endian.

    Raises:
        UnsupportedTensorError: a strided view of what is stored in pieces.
    """
    place = tensor.storage.place
    assert place is not None
    first = tensor.storage_offset // tensor.dtype.per_unit * tensor.dtype.itemsize
    if not tensor.numel:
        recipes: tuple[Recipe, ...] = ()
    elif tensor.contiguous:
        recipes = slices_of(place, first, tensor.nbytes)
    elif isinstance(place, (Joined, Tiled)) or tensor.dtype.per_unit > 1:
        raise UnsupportedTensorError("a strided view of what is stored in pieces")
    else:
        recipes = (Strided(place, first, tensor.dtype.itemsize, tensor.shape, tensor.stride),)
    width = tensor.dtype.swap_nbytes
    if tensor.storage.big_endian and width > 1:
        recipes = tuple(swapped(recipe, width) for recipe in recipes)
    return recipes


def dense_file(name: str, layout: FileLayout, tensors: list[DenseTensor], *, alignment: int) -> FilePlan:
    """A file of these tensors, behind what the layout has already."""
    planned: list[PlannedTensor] = []
    for index, tensor in enumerate(tensors):
        layout.align(alignment)
        record = layout.body(str(index), tensor.recipes)
        planned.extend(
            PlannedTensor(label, tensor.source, tensor.dtype, None, record.offset, record.key)
            for label in tensor.names
        )
    return FilePlan(name, layout.finish(), tuple(planned))
