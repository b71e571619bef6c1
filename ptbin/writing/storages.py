"""Which bytes of each source storage a torch archive keeps, and how its tensors then view them.

Pure. A storage that its tensors view wholly is taken as it is. Of one that they view in part only the
viewed bytes go along: overlapping views stay together (ties and shared memory survive), dense ones
keep their strides, gappy ones are packed in storage order. No tensor changes its shape, its values
or, where it was dense, its stride.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptbin.errors import UnsupportedTensorError
from ptbin.values.dtypes import DType
from ptbin.values.segments import Assemble, Cast, Recipe, Slice, Strided, Swap, nbytes_of
from ptbin.values.tensors import (
    ByteRange,
    Deflated,
    InMemory,
    Joined,
    Place,
    Storage,
    TensorRef,
    Tiled,
    is_contiguous,
)
from ptbin.writing.casts import Casts
from ptbin.writing.layout import whole_range


@dataclass(eq=False, slots=True)
class OutputStorage:
    """One record of the output.

    Attributes:
        recipes: how its bytes come about, one behind the other.
        source: the storage it is taken from.
    """

    key: str
    recipes: tuple[Recipe, ...]
    source: Storage

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.recipes)

    @property
    def stored(self) -> ByteRange | None:
        """Where the source holds all of it plainly: its own record from end to end, unchanged."""
        return whole_range(self.recipes)


@dataclass(slots=True, unsafe_hash=True)  # not frozen, as in `values.tensors`
class OutputTensor:
    """A view into an output storage; units as in `TensorRef`."""

    storage: OutputStorage
    dtype: DType
    stride: tuple[int, ...]
    storage_offset: int


def plan_storages(
    tensors: list[TensorRef], *, keep_keys: bool, casts: Casts
) -> tuple[list[OutputStorage], dict[int, OutputTensor]]:
    """Output storages, in source order, and for each tensor, by its identity, where it then lies.

    Args:
        keep_keys: keep the source's storage keys (zip sources); otherwise number from 0.
        casts: which tensors change their element type.

    Raises:
        UnsupportedTensorError: a big-endian storage seen through element types of different width.
    """
    first_on: dict[int, TensorRef] = {}
    others: dict[int, list[TensorRef]] = {}
    for tensor in tensors:
        if first_on.setdefault(id(tensor.storage), tensor) is not tensor:
            others.setdefault(id(tensor.storage), []).append(tensor)
    outputs: list[OutputStorage] = []
    placed: dict[int, OutputTensor] = {}
    for storage_id, tensor in first_on.items():
        group = [tensor, *others.get(storage_id, ())]
        if len(group) == 1 and _is_whole(tensor) and casts.of(tensor) is None:
            outputs.append(_taken_whole(tensor, placed))
            continue
        views: dict[tuple[object, ...], OutputTensor] = {}
        outputs.extend(_plan_cluster(cluster, views, casts) for cluster in _clusters(_distinct(group)))
        placed.update((id(each), views[each.layout_key()]) for each in group)
    outputs.sort(key=_source_order)
    _name(outputs, keep_keys=keep_keys)
    return outputs, placed


def _is_whole(tensor: TensorRef) -> bool:
    """Whether the tensor is its storage from end to end, as nearly all are, and that lies there plainly."""
    storage = tensor.storage
    return (
        type(storage.place) is ByteRange
        and not storage.big_endian
        and tensor.storage_offset == 0
        and tensor.dtype.per_unit == 1
        and 0 < storage.nbytes == tensor.nbytes
        and is_contiguous(tensor.shape, tensor.stride)
    )


def _taken_whole(tensor: TensorRef, placed: dict[int, OutputTensor]) -> OutputStorage:
    """What `_plan_cluster` makes of such a tensor, as the only view of its storage."""
    storage = tensor.storage
    assert isinstance(storage.place, ByteRange)
    output = OutputStorage("", (Slice(storage.place, 0, storage.nbytes),), storage)
    placed[id(tensor)] = OutputTensor(output, tensor.dtype, tensor.stride, 0)
    return output


def _distinct(group: list[TensorRef]) -> list[TensorRef]:
    return list({tensor.layout_key(): tensor for tensor in group}.values())


def _clusters(views: list[TensorRef]) -> list[list[TensorRef]]:
    """Views of one storage, together where their spans overlap or together cover the storage."""
    storage = views[0].storage
    ordered = sorted(views, key=lambda t: t.span)
    if isinstance(storage.place, Deflated):
        return [ordered]  # inflated once, whatever views it
    end = 0
    covered = all(t.dense for t in ordered)
    for tensor in ordered:
        if tensor.span[0] > end:
            covered = False
        end = max(end, tensor.span[1])
    if covered and end == storage.nbytes:
        return [ordered]
    clusters: list[list[TensorRef]] = []
    end = -1
    for tensor in ordered:
        if clusters and tensor.span[0] < end:
            clusters[-1].append(tensor)
        else:
            clusters.append([tensor])
        end = max(end, tensor.span[1])
    return [part for cluster in clusters for part in _without_gaps(cluster)]


def _without_gaps(cluster: list[TensorRef]) -> list[list[TensorRef]]:
    """The cluster, or each view by itself where they interlace and leave bytes that no tensor views."""
    if len(cluster) == 1 or all(t.dense for t in cluster):
        return [cluster]
    span = max(t.span[1] for t in cluster) - min(t.span[0] for t in cluster)
    return [cluster] if sum(t.nbytes for t in cluster) >= span else [[t] for t in cluster]


def _plan_cluster(
    cluster: list[TensorRef], views: dict[tuple[object, ...], OutputTensor], casts: Casts
) -> OutputStorage:
    storage = cluster[0].storage
    # Offsets count in elements of each view's own type: begin where all of them can.
    width = max(t.dtype.itemsize for t in cluster)
    first = min(t.span[0] for t in cluster) // width * width
    end = max(t.span[1] for t in cluster)
    place = storage.place
    assert place is not None
    target = casts.of_all(cluster, storage.key)
    if (
        isinstance(place, (Deflated, Joined, Tiled))
        or all(t.dense for t in cluster)
        or len(cluster) > 1
        or cluster[0].overlapping
    ):
        output = OutputStorage("", slices_of(place, first, end - first), storage)
        for tensor in cluster:
            moved = tensor.storage_offset - first // tensor.dtype.itemsize * tensor.dtype.per_unit
            views[tensor.layout_key()] = OutputTensor(
                output, target or tensor.dtype, tensor.stride, moved if tensor.numel else 0
            )
    else:
        output = _packed(cluster[0], place, views, target)
    _swap(output, cluster)
    if target is not None and output.nbytes:
        output.recipes = (Cast(output.recipes, cluster[0].dtype, target, f"storage {storage.key}"),)
    return output


def slices_of(place: Place, offset: int, nbytes: int) -> tuple[Recipe, ...]:
    """The bytes from `offset` on, from every place they lie in.

    Raises:
        UnsupportedTensorError: a part of what has to be put together from tiles.
    """
    if isinstance(place, Tiled):
        if (offset, nbytes) == (0, place.nbytes):
            return (Assemble(place),)
        raise UnsupportedTensorError("a view of a part of a tensor that is stored in tiles")
    if not isinstance(place, Joined):
        return (Slice(place, offset, nbytes),)
    slices = []
    position = 0
    for part in place.parts:
        first, last = max(offset - position, 0), min(offset + nbytes - position, part.nbytes)
        if first < last:
            slices.append(Slice(part, first, last - first))
        position += part.nbytes
    return tuple(slices)


def _packed(
    tensor: TensorRef,
    place: ByteRange | InMemory,
    views: dict[tuple[object, ...], OutputTensor],
    target: DType | None,
) -> OutputStorage:
    """A gappy view, packed; broadcast dimensions are stored once and stay broadcast."""
    kept = [
        (s, n, axis)
        for axis, (n, s) in enumerate(zip(tensor.shape, tensor.stride, strict=True))
        if n > 1 and s != 0
    ]
    kept.sort(key=lambda item: (-item[0], item[2]))
    shape = tuple(n for _, n, _ in kept)
    recipe = Strided(place, tensor.span[0], tensor.dtype.itemsize, shape, tuple(s for s, _, _ in kept))
    stride = [0] * len(tensor.shape)
    step = 1
    for _, n, axis in reversed(kept):
        stride[axis] = step
        step *= n
    for axis, n in enumerate(tensor.shape):
        if n == 1:
            stride[axis] = 1
    output = OutputStorage("", (recipe,), tensor.storage)
    views[tensor.layout_key()] = OutputTensor(output, target or tensor.dtype, tuple(stride), 0)
    return output


def _swap(output: OutputStorage, cluster: list[TensorRef]) -> None:
    if not output.source.big_endian:
        return
    widths = {t.dtype.swap_nbytes for t in cluster}
    if len(widths) > 1:
        raise UnsupportedTensorError(
            f"big-endian storage {output.source.key!r} is viewed "
            f"as elements of {sorted(widths)} bytes at once"
        )
    width = widths.pop()
    if width > 1 and output.nbytes:
        output.recipes = tuple(swapped(recipe, width) for recipe in output.recipes)


def swapped(recipe: Recipe, width: int) -> Swap:
    assert isinstance(recipe, (Slice, Strided))
    return Swap(recipe, width)


def _source_order(output: OutputStorage) -> tuple[int, int]:
    recipes = output.recipes
    if recipes and type(recipes[0]) is Slice and type(recipes[0].place) is ByteRange:
        return recipes[0].place.offset, recipes[0].offset
    return _first_offset(output.recipes[0]) if output.recipes else (1 << 63, 0)


def _first_offset(recipe: Recipe) -> tuple[int, int]:
    """Where in the source a recipe begins to read; what lies in memory comes behind everything else."""
    if isinstance(recipe, Cast):
        return _first_offset(recipe.inner[0])
    if isinstance(recipe, Swap):
        return _first_offset(recipe.inner)
    place: Place
    if isinstance(recipe, Assemble):
        place, offset = recipe.tiled.tiles[0].place, recipe.tiled.tiles[0].offset
    else:
        place, offset = recipe.place, recipe.offset
    return (place.offset, offset) if isinstance(place, (ByteRange, Deflated)) else (1 << 63, 0)


def _name(outputs: list[OutputStorage], *, keep_keys: bool) -> None:
    taken: set[str] = {output.source.key.casefold() for output in outputs} if keep_keys else set()
    used: set[str] = set()
    parts: dict[str, int] = {}
    """By folded key, the first number behind it that may be free."""
    for index, output in enumerate(outputs):
        key = (
            output.source.key
            if keep_keys and isinstance(output.source.place, (ByteRange, Deflated))
            else str(index)
        )
        # Case-folded, as torch looks members up.
        folded = key.casefold()
        if folded in used:
            part = parts.get(folded, 1)
            while f"{folded}_{part}" in used or f"{folded}_{part}" in taken:
                part += 1
            parts[folded] = part + 1
            key = f"{key}_{part}"
            folded = f"{folded}_{part}"
        used.add(folded)
        output.key = key
