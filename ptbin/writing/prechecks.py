"""Which of the source's CRC-32s are confirmed although not all bytes they cover go along. Pure.

A storage that is taken whole is checked on its way. Of one that is viewed in part, the rest is read as well
where that costs little; elsewhere the manifest says that the source's own checksum was not confirmed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ptbin.values.segments import Assemble, Cast, Recipe, Slice, Swap, nbytes_of
from ptbin.values.tensors import ByteRange, Tile, dense_strides

__all__ = ["is_checked", "prechecks_for"]

# Reading more of a storage than its view, only to confirm the stored CRC-32, may cost this much.
PRECHECK_FLOOR_NBYTES = 512 * 1024
PRECHECK_SHARE = 100


def prechecks_for(records: Iterable[tuple[Recipe, ...]]) -> tuple[ByteRange, ...]:
    """Ranges worth confirming, smallest first, within the allowance."""
    listed = list(records)
    allowance = max(PRECHECK_FLOOR_NBYTES, sum(map(nbytes_of, listed)) // PRECHECK_SHARE)
    partial = dict.fromkeys(place for recipes in listed for place in _unconfirmed(recipes))
    chosen = []
    for place in sorted(partial, key=lambda place: place.nbytes):
        allowance -= place.nbytes
        if allowance < 0:
            break
        chosen.append(place)
    return tuple(chosen)


def is_checked(recipes: tuple[Recipe, ...], prechecks: tuple[ByteRange, ...]) -> bool:
    """Whether every CRC-32 that the source states for these bytes is confirmed."""
    return all(place in prechecks for place in _unconfirmed(recipes))


def _unconfirmed(recipes: tuple[Recipe, ...]) -> Iterator[ByteRange]:
    """Ranges with a stated CRC-32 that streaming the recipes does not confirm by itself."""
    for recipe in recipes:
        if isinstance(recipe, Cast):
            yield from _unconfirmed(recipe.inner)
        elif isinstance(recipe, Swap):
            yield from _unconfirmed((recipe.inner,))
        elif isinstance(recipe, Assemble):
            yield from (tile.place for tile in recipe.tiled.tiles if _is_partial_tile(tile))  # type: ignore[misc]
        elif isinstance(recipe.place, ByteRange) and recipe.place.crc32 is not None:
            whole = isinstance(recipe, Slice) and recipe.nbytes == recipe.place.nbytes
            if not whole:
                yield recipe.place


def _is_partial_tile(tile: Tile) -> bool:
    """Whether reading the tile row by row leaves its CRC-32 unconfirmed (`splice.assembly`)."""
    place = tile.place
    if not isinstance(place, ByteRange) or place.crc32 is None:
        return False
    return tile.offset != 0 or tile.stride != dense_strides(tile.shape)
