"""The plan of parts against S3's own rules, for any mix of stretches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptbin.stores.parts import GIB, MIB, Extent, Part, PartRules, plan_parts

# The rules in miniature, so that every limit is met: parts of 5 to 60 bytes, at most 40 of them.
SMALL = PartRules(min_nbytes=5, max_nbytes=60, max_parts=40, copy_nbytes=16, upload_nbytes=8)
stretches = st.lists(
    st.builds(Extent, st.one_of(st.integers(0, 12), st.integers(0, 400)), st.booleans()), max_size=12
)


def check_rules(parts: list[Part], planned: list[Extent], rules: PartRules) -> None:
    total = sum(stretch.nbytes for stretch in planned)
    assert len(parts) <= rules.max_parts
    position = 0
    for part in parts:
        assert part.start == position
        assert part.nbytes <= rules.max_nbytes
        position += part.nbytes
    assert position == total
    assert all(part.nbytes >= rules.min_nbytes for part in parts[:-1])
    assert all(part.nbytes for part in parts)
    if rules.equal:
        assert len({part.nbytes for part in parts[:-1]}) <= 1
        assert not parts or parts[-1].nbytes <= parts[0].nbytes
    runs = []
    start = 0
    for stretch in planned:
        if stretch.copyable:
            runs.append((start, start + stretch.nbytes))
        start += stretch.nbytes
    for part in parts:
        if part.copied:
            assert any(a <= part.start and part.start + part.nbytes <= b for a, b in runs)


@given(stretches, st.booleans())
def test_every_plan_keeps_the_rules(planned: list[Extent], equal: bool) -> None:
    rules = PartRules(min_nbytes=5, max_nbytes=60, max_parts=40, copy_nbytes=16, upload_nbytes=8, equal=equal)
    if sum(stretch.nbytes for stretch in planned) > rules.max_parts * rules.max_nbytes:
        with pytest.raises(ValueError, match="more than"):
            plan_parts(planned, rules)
        return
    check_rules(plan_parts(planned, rules), planned, rules)


@given(st.integers(0, 4), st.integers(11, 2000), st.integers(0, 4))
def test_of_one_run_only_the_lead_in_borrows(before: int, nbytes: int, after: int) -> None:
    planned = [
        Extent(before, copyable=False),
        Extent(nbytes, copyable=True),
        Extent(after, copyable=False),
    ]
    parts = plan_parts(planned, SMALL)
    uploaded = sum(part.nbytes for part in parts if not part.copied)
    assert uploaded == (5 if before else 0) + after


@pytest.mark.parametrize("nbytes", [12 * MIB, 3 * GIB, 100 * GIB, 700 * GIB, 5 << 40])
def test_a_checkpoint_of_any_size_is_one_small_upload_and_copies(nbytes: int) -> None:
    planned = [
        Extent(170_000, copyable=False),
        Extent(nbytes, copyable=True),
        Extent(60_000, copyable=False),
    ]
    parts = plan_parts(planned, PartRules())
    check_rules(parts, planned, PartRules())
    assert sum(part.nbytes for part in parts if not part.copied) == 5 * MIB + 60_000
    assert [part.copied for part in parts] == [False] + [True] * (len(parts) - 2) + [False]


def test_many_runs_never_make_too_many_parts() -> None:
    planned = [Extent(11 * MIB if index % 2 else 100, index % 2 == 1) for index in range(40_000)]
    parts = plan_parts(planned, PartRules())
    check_rules(parts, planned, PartRules())
    assert len(parts) > 1000


def test_equal_parts_for_stores_that_want_them() -> None:
    planned = [Extent(1000, copyable=False), Extent(GIB, copyable=True), Extent(1000, copyable=False)]
    rules = PartRules(equal=True)
    parts = plan_parts(planned, rules)
    check_rules(parts, planned, rules)
    assert [part.copied for part in parts] == [False] + [True] * 63 + [False]
