"""Where the piece that a rank holds of a distributed tensor lies in the whole: placements on a mesh. Pure.

A tensor has one placement for each dimension of its mesh. `Shard(d)` cuts dimension d as `torch.chunk` does:
pieces of ceil(n / count), the last ones shorter or empty. Cuts are made from the left mesh dimension to the
right, but where FSDP cut what tensor parallelism had cut before: `_StridedShard` on the left then counts in
`split_factor` the pieces there were, and `shard_order` (torch 2.10 and later) states the order outright.
`Replicate` changes nothing. A `Partial` is a summand and no piece.

Sources: torch/distributed/tensor/placement_types.py (`Shard`, `_StridedShard._split_tensor`),
_dtensor_spec.py (`shard_order`), fsdp/_fully_shard/_fsdp_param.py, 2.5 to 2.14.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ptbin.reading.pickle.meshes import attributes_of
from ptbin.values.nodes import DictNode, Instance

MAX_SPLIT_FACTOR = 1 << 14

Run = tuple[int, int]
"""First index and count along one dimension."""

Interpretation = Literal["ordered", "nested", "dealt"]
"""What a strided placement means: a cut that comes behind those it counts; a share of each of `split_factor`
pieces; every n-th of all pieces (`_StridedShard._split_tensor` since 2.10, and before).
"""


@dataclass(frozen=True, slots=True)
class Placement:
    """What one mesh dimension does to a tensor: `dim` is cut; None where the piece is the same all along it.

    Attributes:
        split_factor: pieces that `dim` was in before this cut; 1 for a plain `Shard`.
    """

    dim: int | None = None
    split_factor: int = 1


def placements_of(spec: DictNode, dimensions: int) -> tuple[Placement, ...] | str:
    """The placements of a `DTensorSpec`, or why they do not say where its piece goes."""
    found = spec.get("placements")
    if not isinstance(found, (tuple, list)):
        return "it has no placements"
    placements = []
    for item in found:
        name = item.class_path.rpartition(".")[2] if isinstance(item, Instance) else type(item).__name__
        if name == "Replicate":
            placements.append(Placement())
            continue
        if name not in ("Shard", "_StridedShard"):
            kind = (
                "a summand of the whole" if "Partial" in name else "placed in a way that ptbin does not know"
            )
            return f"it is {kind} ({name[:80]}); save it as `full_tensor()` gives it"
        attributes = attributes_of(item)
        dim, factor = attributes.get("dim"), attributes.get("split_factor", 1)
        if type(dim) is not int or type(factor) is not int or not 0 < factor <= MAX_SPLIT_FACTOR:
            return "its placement says no dimension"
        dim = dim + dimensions if dim < 0 else dim
        if not 0 <= dim < dimensions:
            return f"it is cut along dimension {dim} of {dimensions}"
        placements.append(Placement(dim, factor if name == "_StridedShard" else 1))
    return tuple(placements)


def stated_orders(spec: DictNode) -> dict[int, tuple[int, ...]]:
    """Tensor dimension to mesh dimensions in the order in which they cut it, where the spec says so."""
    orders = {}
    entries = spec.get("shard_order")
    for entry in entries if isinstance(entries, (tuple, list)) else ():
        fields = entry.args if isinstance(entry, Instance) else entry
        if isinstance(fields, tuple) and len(fields) == 2 and isinstance(fields[1], (tuple, list)):
            orders[fields[0]] = tuple(fields[1])
    return {dim: order for dim, order in orders.items() if all(type(n) is int for n in (dim, *order))}


def runs_of(
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: Sequence[Placement],
    orders: Mapping[int, tuple[int, ...]],
    reading: Interpretation = "ordered",
) -> list[list[Run]] | None:
    """For every dimension the runs of indices that the rank holds, in order.

    None where placements that count other pieces than there are cannot be read in order.
    """
    found = []
    for dim, size in enumerate(shape):
        cuts = [index for index, placement in enumerate(placements) if placement.dim == dim]
        if not cuts:
            found.append([(0, size)])
        elif reading != "ordered":
            found.append(_cut_strided(size, cuts, grid, coordinate, placements, reading))
        else:
            stated = orders.get(dim)
            order = (
                stated if stated is not None and sorted(stated) == cuts else _order(cuts, grid, placements)
            )
            if order is None:
                return None
            found.append(_cut_in_order(size, order, grid, coordinate))
    return found


def interpretations_of(spec: DictNode, placements: Sequence[Placement]) -> tuple[Interpretation, ...]:
    """The ways to read the placements, of which the first that fits the pieces' sizes counts.

    FSDP2 over tensor parallelism cuts in order, and so does torch 2.13 whatever it distributes, and notes it
    as `use_strided_shard_as_shard_order`. It notes False where an operation made the placements as they
    stand. Earlier torches note nothing; only `distribute_tensor` called with the private class deals there.
    """
    if all(placement.split_factor == 1 for placement in placements):
        return ("ordered",)
    if spec.get("use_strided_shard_as_shard_order") is False:
        return ("nested",)
    # 2.10 has a shard_order, and cuts the pieces of a piece; before that all pieces were dealt out.
    return ("ordered", "nested" if "shard_order" in spec.by_name() else "dealt")


def _order(
    cuts: Sequence[int], grid: tuple[int, ...], placements: Sequence[Placement]
) -> tuple[int, ...] | None:
    """Mesh dimensions in the order in which they cut: a strided one comes behind those it counts."""
    order: list[int] = []
    for index in reversed(cuts):
        pieces, place = 1, 0
        while pieces < placements[index].split_factor and place < len(order):
            pieces *= grid[order[place]]
            place += 1
        if pieces != placements[index].split_factor:
            return None
        order.insert(place, index)
    return tuple(order)


def _cut_in_order(
    size: int, order: Sequence[int], grid: tuple[int, ...], coordinate: tuple[int, ...]
) -> list[Run]:
    first, count = 0, size
    for index in order:
        begin, taken = _chunk(count, grid[index], coordinate[index])
        first, count = first + begin, taken
    return [(first, count)]


def _chunk(size: int, pieces: int, index: int) -> Run:
    """As `torch.chunk`: pieces of the rounded-up size until nothing is left."""
    most = -(-size // pieces)
    begin = min(index * most, size)
    return begin, min(most, size - begin)


def _cut_strided(
    size: int,
    cuts: Sequence[int],
    grid: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: Sequence[Placement],
    reading: Interpretation,
) -> list[Run]:
    """From left to right, as `_StridedShard._split_tensor`: the rank's share of each of the pieces before."""
    runs: list[Run] = [(0, size)]
    for index in cuts:
        total = sum(count for _, count in runs)
        ranks, factor, own = grid[index], placements[index].split_factor, coordinate[index]
        if reading == "dealt":
            pieces = [_chunk(total, ranks * factor, own + ranks * turn) for turn in range(factor)]
        else:
            before = [_chunk(total, factor, turn) for turn in range(factor)]
            shares = [_chunk(count, ranks, own) for _, count in before]
            pieces = [
                (begin + first, count) for (begin, _), (first, count) in zip(before, shares, strict=True)
            ]
        runs = [run for begin, count in pieces for run in _within(runs, begin, count)]
    return _fused(runs)


def _within(runs: Sequence[Run], begin: int, count: int) -> Iterator[Run]:
    """The part of a sequence of runs from its `begin`-th index on."""
    position = 0
    for first, length in runs:
        low, high = max(begin, position), min(begin + count, position + length)
        if low < high:
            yield first + low - position, high - low
        position += length


def _fused(runs: Sequence[Run]) -> list[Run]:
    found: list[Run] = []
    for first, count in runs:
        if found and sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((first, count))
    return found or [(0, 0)]
