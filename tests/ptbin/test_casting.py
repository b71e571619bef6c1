"""Casts of streamed bytes against `torch.Tensor.to`, bit for bit; every NaN's bits included.

Tensors go to torch with a length that is a multiple of 64, so that its vectorised code takes all of their
elements (see the module's docstring); other lengths are compared with NaNs as NaNs.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from ptbin.splice.casting import BLOCK, SMALL_NBYTES, CastTally, iter_cast
from ptbin.values.dtypes import BY_NAME, CAST_NAMES

PAIRS = [(source, target) for source in CAST_NAMES for target in CAST_NAMES]
# Casts in which torch's scalar code, for a tensor's last elements, has other NaNs than its vectorised code.
NAN_BY_PLACE = {("float64", "bfloat16"), ("float32", "bfloat16"), ("float16", "float32")}


def by_torch(values: np.ndarray[Any, Any], source: str, target: str) -> torch.Tensor:
    raw = torch.from_numpy(values.view(np.uint8).copy())
    return raw.view(getattr(torch, source)).to(getattr(torch, target))


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(torch.uint8).numpy().view(f"u{tensor.element_size()}")


def by_ptbin(data: bytes, source: str, target: str, cuts: tuple[int, ...] = ()) -> tuple[Any, CastTally]:
    tally = CastTally()
    edges = (0, *cuts, len(data))
    stream = (data[first:last] for first, last in pairwise(edges))
    out = b"".join(iter_cast(stream, BY_NAME[source], BY_NAME[target], tally))
    return np.frombuffer(out, f"u{BY_NAME[target].itemsize}"), tally


def finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(tensor.to(torch.float64))


def assert_equal(values: np.ndarray[Any, Any], source: str, target: str) -> None:
    assert len(values) % 64 == 0
    expected = by_torch(values, source, target)
    found, tally = by_ptbin(values.tobytes(), source, target)
    wanted = bits(expected)
    wrong = np.flatnonzero(found != wanted) if len(found) == len(wanted) else np.arange(1)
    first = [(hex(values[i]), hex(found[i]), hex(wanted[i])) for i in wrong[:4]]
    assert not len(wrong), f"{len(wrong)} of {len(values)}: (source, ptbin, torch) {first}"
    overflowed = finite(by_torch(values, source, source)) & ~finite(expected)
    assert tally.overflowed == int(overflowed.sum())


def hard_patterns(itemsize: int) -> np.ndarray[Any, Any]:
    """All signs and exponents of float32 or float64, with the mantissas at which something changes."""
    width, top = (23, 0xFF) if itemsize == 4 else (52, 0x7FF)
    edges = {0, 1, (1 << width) - 1}
    for bit in range(width):
        # a lone bit and everything below it: ties, subnormals' ties, NaN payloads; and one to either side
        edges |= {1 << bit, (1 << bit) + 1, (1 << bit) - 1, (1 << width) - (1 << bit)}
        edges |= {(1 << width) - (1 << bit) - 1, (3 << bit) % (1 << width), (1 << (width - 1)) | (1 << bit)}
    # Ties of each target, with an even and with an odd last bit, and what lies beside the ties; in float64,
    # what lies beside them becomes a tie in float32, and is rounded twice.
    for kept in (1, 2, 3, 7, 10, 23):
        if kept < width:
            half = 1 << (width - kept - 1)
            edges |= {(half * odd + near) % (1 << width) for odd in (1, 3, 5, 7) for near in (-1, 0, 1)}
    mantissas = np.array(sorted(edges), np.uint64)
    heads = (np.arange(2 * (top + 1), dtype=np.uint64) << np.uint64(width)).reshape(-1, 1)
    return padded((heads | mantissas).ravel().astype(f"u{itemsize}"))


def padded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.resize(values, -(-len(values) // 64) * 64)


@pytest.mark.thorough
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_pattern_or_every_hard_one(source: str, target: str) -> None:
    itemsize = BY_NAME[source].itemsize
    if itemsize <= 2:
        assert_equal(np.arange(1 << (8 * itemsize), dtype=f"u{itemsize}"), source, target)
        return
    values = hard_patterns(itemsize)
    assert_equal(values, source, target)
    # Few odd ones among numbers that need no care: the other branch of the fast ways.
    rng = np.random.default_rng(7)
    plain = rng.standard_normal(10 * len(values)).astype(f"f{itemsize}").view(f"u{itemsize}")
    plain[rng.choice(len(plain), len(values), replace=False)] = values
    assert_equal(plain, source, target)


@pytest.mark.parametrize(("source", "target"), [p for p in PAIRS if BY_NAME[p[0]].itemsize > 2])
def test_random_patterns(source: str, target: str) -> None:
    itemsize = BY_NAME[source].itemsize
    rng = np.random.default_rng(11)
    values = np.frombuffer(rng.bytes(itemsize << 21), f"u{itemsize}")
    assert_equal(values, source, target)
    # Exponents from float8's to float16's: of random patterns few have those.
    spread = np.ldexp(rng.uniform(-2, 2, 1 << 19), rng.integers(-30, 20, 1 << 19))
    assert_equal(spread.astype(f"f{itemsize}").view(f"u{itemsize}"), source, target)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_lengths_that_leave_torch_a_scalar_tail(source: str, target: str) -> None:
    itemsize = BY_NAME[source].itemsize
    every = np.arange(1 << (8 * itemsize), dtype=f"u{itemsize}") if itemsize <= 2 else hard_patterns(itemsize)
    rng = np.random.default_rng(13)
    for length in [*range(1, 71), 4099]:
        values = rng.choice(every, length)
        expected = by_torch(values, source, target)
        wanted = bits(expected)
        found, _ = by_ptbin(values.tobytes(), source, target)
        differs = found != wanted
        if (source, target) in NAN_BY_PLACE:
            nan = torch.isnan(expected.to(torch.float64)).numpy()
            again = torch.from_numpy(found.view(np.uint8).copy()).view(getattr(torch, target))
            assert (torch.isnan(again.to(torch.float64)).numpy() == nan).all()
            differs &= ~nan
        assert not differs.any(), (length, values[differs], found[differs], wanted[differs])


@pytest.mark.parametrize(("source", "target"), [("float32", "bfloat16"), ("float64", "float16")])
def test_pieces_may_split_elements(source: str, target: str) -> None:
    itemsize = BY_NAME[source].itemsize
    data = np.random.default_rng(17).standard_normal(3 * BLOCK + 5).astype(f"f{itemsize}").tobytes()
    whole, _ = by_ptbin(data, source, target)
    assert len(whole) == 3 * BLOCK + 5
    small, large = SMALL_NBYTES, len(data)
    for cuts in [
        (1,),
        (1, 2, 3, 3, 4, 9),
        tuple(range(small)),
        (small - 1, 2 * small + 1),
        (small + 3, small + 4),
        (large - 1,),
        (large - small - 3, large - small, large - 2),
    ]:
        found, _ = by_ptbin(data, source, target, cuts)
        assert np.array_equal(found, whole), cuts[:9]


def test_memory_is_bounded_and_pieces_are_small() -> None:
    def stream() -> Iterator[bytes]:
        for _ in range(8):
            yield bytes(4 << 20)

    pieces = [len(p) for p in iter_cast(stream(), BY_NAME["float32"], BY_NAME["float64"], CastTally())]
    assert sum(pieces) == 64 << 20
    assert max(pieces) <= 8 * BLOCK


@pytest.mark.parametrize("length", [1, 2, 3, 5, 4 * BLOCK + 7, SMALL_NBYTES + 1])
@pytest.mark.parametrize("target", ["bfloat16", "float32"])
def test_stream_ends_inside_an_element(length: int, target: str) -> None:
    with pytest.raises(ValueError, match="bytes into an element of 4"):
        list(iter_cast(iter([bytes(length)]), BY_NAME["float32"], BY_NAME[target], CastTally()))


def test_nothing_becomes_nothing() -> None:
    for stream in ([], [b""], [b"", b""]):
        assert list(iter_cast(iter(stream), BY_NAME["float32"], BY_NAME["bfloat16"], CastTally())) == []


@pytest.mark.parametrize(("source", "target"), [("int64", "float32"), ("float32", "float8_e8m0fnu")])
def test_other_types_are_refused_at_once(source: str, target: str) -> None:
    with pytest.raises(ValueError, match="no casts from or to"):
        iter_cast(iter([]), BY_NAME[source], BY_NAME[target], CastTally())


def test_overflow_is_counted_over_all_pieces_without_warnings() -> None:
    one = np.array([1e5, -1e5, 65519.9, 65520, np.inf, -np.inf, np.nan, 1e-9, 0, 3e38], np.float32)
    data = np.resize(one, 10 * BLOCK).tobytes()
    tally = CastTally(overflowed=1)
    before = np.geterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target in ("float16", "bfloat16", "float8_e5m2"):
            for _ in iter_cast(iter([data]), BY_NAME["float32"], BY_NAME[target], tally):
                assert np.geterr() == before
    assert tally.overflowed == 1 + (4 + 0 + 5) * BLOCK


@pytest.mark.starts_processes
def test_neither_torch_nor_numpy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, ptbin.splice.casting as c; from ptbin.values.dtypes import BY_NAME as b\n"
        "assert not {'numpy', 'torch', 'ml_dtypes'} & set(sys.modules)\n"
        "list(c.iter_cast(iter([bytes(8)]), b['float32'], b['float8_e5m2'], c.CastTally()))\n"
        "assert 'numpy' in sys.modules and not {'torch', 'ml_dtypes'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
