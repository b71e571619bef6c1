from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptbin.stores.ranges import Fetch, Piece, plan_fetches


def plan(ranges: list[tuple[int, int]], chunk: int = 100, gap: int = 0) -> list[Fetch]:
    return list(plan_fetches(ranges, chunk_nbytes=chunk, gap_nbytes=gap))


def test_a_long_range_is_cut_into_chunks() -> None:
    assert [(fetch.offset, fetch.nbytes) for fetch in plan([(5, 250)])] == [(5, 100), (105, 100), (205, 50)]


def test_neighbours_share_a_request() -> None:
    assert plan([(0, 10), (10, 5)]) == [Fetch(0, 15, (Piece(0, 0, 10), Piece(1, 10, 15)))]


def test_a_cheap_gap_is_fetched_and_dropped() -> None:
    assert plan([(0, 10), (15, 5)], gap=5) == [Fetch(0, 20, (Piece(0, 0, 10), Piece(1, 15, 20)))]
    assert [fetch.nbytes for fetch in plan([(0, 10), (16, 5)], gap=5)] == [10, 5]


def test_a_gap_at_the_end_of_a_chunk_is_not_fetched() -> None:
    assert [(fetch.offset, fetch.nbytes) for fetch in plan([(0, 98), (101, 5)], gap=10)] == [
        (0, 98),
        (101, 5),
    ]


def test_ranges_that_go_back_or_overlap_stand_alone() -> None:
    assert [(fetch.offset, fetch.nbytes) for fetch in plan([(50, 10), (0, 10), (5, 10)], gap=99)] == [
        (50, 10),
        (0, 10),
        (5, 10),
    ]


def test_empty_ranges_cost_nothing() -> None:
    assert plan([(0, 0), (7, 0)]) == []


def test_planning_is_lazy() -> None:
    fetches = plan_fetches([(0, 1 << 60)], chunk_nbytes=1)
    assert next(fetches).offset == 0


@pytest.mark.parametrize(("chunk", "gap"), [(0, 0), (1, -1)])
def test_sizes_that_fit_no_request_are_refused(chunk: int, gap: int) -> None:
    with pytest.raises(ValueError, match="chunk"):
        plan([(0, 1)], chunk, gap)


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 90)), max_size=12),
    st.integers(1, 64),
    st.integers(0, 40),
)
def test_every_plan_delivers_every_byte_once_and_in_order(
    ranges: list[tuple[int, int]], chunk: int, gap: int
) -> None:
    content = bytes(i % 251 for i in range(300))
    got = [b""] * len(ranges)
    last = (-1, 0)
    fetched = 0
    for fetch in plan(ranges, chunk, gap):
        assert 1 <= fetch.nbytes <= chunk
        fetched += fetch.nbytes
        block = content[fetch.offset : fetch.offset + fetch.nbytes]
        for piece in fetch.pieces:
            assert 0 <= piece.start < piece.stop <= fetch.nbytes
            assert piece.index >= last[0]
            last = (piece.index, piece.stop)
            got[piece.index] += block[piece.start : piece.stop]
        assert fetch.pieces[0].start == 0
        assert fetch.pieces[-1].stop == fetch.nbytes
    assert got == [content[offset : offset + nbytes] for offset, nbytes in ranges]
    assert fetched <= sum(nbytes for _, nbytes in ranges) + gap * len(ranges)
