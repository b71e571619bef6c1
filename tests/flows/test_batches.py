"""`flows.batches`: nothing lost, never too many, the large ones first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flows.batches import BATCH_COUNT, BATCH_NBYTES, MAX_BATCHES, cut, iter_batches

sizes_lists = st.lists(st.integers(0, 1 << 40), max_size=400)


def plan(
    sizes: list[int], *, workers: int = 2, max_batches: int = MAX_BATCHES
) -> list[list[tuple[int, int]]]:
    ordered = sorted(enumerate(sizes), key=lambda item: -item[1])
    bounds = {"workers": workers, "max_batches": max_batches}
    return list(iter_batches(ordered, len(sizes), sum(sizes), nbytes=lambda item: item[1], **bounds))


@given(sizes_lists, st.integers(1, 64), st.integers(1, MAX_BATCHES))
def test_every_item_is_in_exactly_one_batch(sizes: list[int], workers: int, max_batches: int) -> None:
    batches = plan(sizes, workers=workers, max_batches=max_batches)
    assert sorted(item for batch in batches for item in batch) == list(enumerate(sizes))
    assert all(batches)


@given(sizes_lists, st.integers(1, 64), st.integers(3, MAX_BATCHES))
def test_there_are_never_more_batches_than_allowed(sizes: list[int], workers: int, max_batches: int) -> None:
    assert len(plan(sizes, workers=workers, max_batches=max_batches)) <= max_batches


@given(sizes_lists)
def test_the_largest_come_first(sizes: list[int]) -> None:
    flat = [size for batch in plan(sizes) for _, size in batch]
    assert flat == sorted(sizes, reverse=True)


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=300), st.integers(1, 8))
def test_a_batch_that_could_have_closed_earlier_did(sizes: list[int], workers: int) -> None:
    for batch in plan(sizes, workers=workers):
        assert len(batch) <= BATCH_COUNT
        assert sum(size for _, size in batch[:-1]) < BATCH_NBYTES


def test_a_huge_checkpoint_is_alone() -> None:
    batches = plan([10 << 30, *[1000] * 20], workers=1)
    assert [size for _, size in batches[0]] == [10 << 30]


def test_few_checkpoints_still_occupy_every_worker() -> None:
    assert len(plan([1000] * 32, workers=8)) == 32
    assert len(plan([1000] * 300, workers=2)) == 8


def test_a_hundred_thousand_checkpoints_stay_within_the_bound() -> None:
    assert len(plan([5 << 20] * 100_000)) <= MAX_BATCHES


def test_items_of_one_size_keep_their_order() -> None:
    flat = [number for batch in plan([7] * 100) for number, _ in batch]
    assert flat == list(range(100))


@given(st.lists(st.integers(), max_size=300), st.integers(1, 50), st.integers(1, 20))
def test_cut_keeps_order_and_bound(items: list[int], count: int, max_batches: int) -> None:
    parts = list(cut(iter(items), len(items), count, max_batches=max_batches))
    assert [item for part in parts for item in part] == items
    assert len(parts) <= max_batches
