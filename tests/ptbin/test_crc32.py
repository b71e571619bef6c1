"""CRC-32s are zlib's, whichever library counts them."""

from __future__ import annotations

import random
import runpy
import sys
import zlib
from itertools import pairwise

import pytest

import ptbin.values.crc32
from ptbin.values.crc32 import combine_crc32, crc32_of, crc32_of_all

SIZES = [0, 1, 7, 15, 16, 17, 255, 4096, 65_537, 1 << 20]


@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_are_counted_as_zlib_counts_them(nbytes: int) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    for begin in (0, 1, 0xFFFFFFFF):
        for given in (data, bytearray(data), memoryview(data)):
            assert crc32_of(given, begin) == zlib.crc32(data, begin)
    assert crc32_of(memoryview(data)[nbytes // 3 :]) == zlib.crc32(data[nbytes // 3 :])


def test_parts_come_to_their_whole() -> None:
    data = random.Random(0).randbytes(100_000)
    cuts = [0, 1, 1, 4096, 99_999, 100_000]
    parts = [data[start:end] for start, end in pairwise(cuts)]
    total = 0
    for part in parts:
        total = combine_crc32(total, crc32_of(part), len(part))
    assert total == crc32_of_all(parts) == zlib.crc32(data)


def test_zlib_counts_where_the_faster_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    loaded = runpy.run_path(ptbin.values.crc32.__file__)
    assert loaded["crc32_of"] is zlib.crc32
