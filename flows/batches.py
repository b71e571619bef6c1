"""Cut a list of sized things into batches. Pure.

A Prefect task costs some milliseconds and rows in a database, so tasks must be few; a batch is also the
unit that waits for its last member, so it must not be large. Largest first: the long conversions begin
while there is still other work to fill the other workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

MAX_BATCHES = 200
BATCH_NBYTES = 256 << 20
"""About half a second of local work, and several of network work."""
BATCH_COUNT = 50
BATCHES_PER_WORKER = 4
"""So that the workers finish at about the same time."""


def iter_batches(
    ordered: Iterable[Item],
    count: int,
    total: int,
    *,
    nbytes: Callable[[Item], int],
    workers: int,
    max_batches: int = MAX_BATCHES,
    most: int = BATCH_COUNT,
    per_worker: int = BATCHES_PER_WORKER,
) -> Iterator[list[Item]]:
    """Batches of `count` items, `total` bytes together, that come largest first: at most `max_batches`.

    A batch closes when it holds the count or has reached the bytes; an item larger than that is alone in its
    batch. Both bounds shrink for short lists, so that each worker gets `per_worker` batches, and grow for
    long ones; else `most` items go into one.
    """
    # Every closed batch has used up a share of the count or of the bytes: with half of the batches
    # allowed to each, and one unfinished batch at the end, there are never more than `max_batches`.
    half = max(1, (max_batches - 1) // 2)
    wanted = max(1, workers) * per_worker
    most_items = max(min(most, _divide_up(count, wanted)), _divide_up(count, half))
    most_nbytes = max(min(BATCH_NBYTES, _divide_up(total, wanted)), _divide_up(total, half), 1)
    current: list[Item] = []
    current_nbytes = 0
    for item in ordered:
        current.append(item)
        current_nbytes += nbytes(item)
        if len(current) >= most_items or current_nbytes >= most_nbytes:
            yield current
            current, current_nbytes = [], 0
    if current:
        yield current


def cut(
    items: Iterable[Item], total: int, count: int, *, max_batches: int = MAX_BATCHES
) -> Iterator[list[Item]]:
    """Parts of `count` of the `total` items in their order, larger ones where they would be too many."""
    size = max(count, _divide_up(total, max_batches))
    rest = iter(items)
    while part := list(itertools.islice(rest, size)):
        yield part


def _divide_up(amount: int, parts: int) -> int:
    return -(-amount // parts)
