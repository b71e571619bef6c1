"""Digests of large local files, hashed in groups on several threads, are those of hashlib, zlib and NumPy."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ptbin import cores
from ptbin.proof.digests import digest_descriptor, digest_file
from ptbin.proof.growing import GROUP_NBYTES, GrowingFile
from ptbin.proof.regions import RegionLane
from ptbin.stores.local import LocalStore
from ptbin.values.digests import StoredTensor
from tests.fakes import CountingStore

MIB = 1 << 20


class Interrupted(Exception):  # noqa: N818 - stands for Ctrl-C
    pass


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(5).randbytes(3 * GROUP_NBYTES + 12_345)


@pytest.fixture
def descriptor(data: bytes, tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(data)
    opened = os.open(tmp_path / "file", os.O_RDONLY)
    yield opened
    os.close(opened)


def ended(offset: int, nbytes: int) -> bytes:
    raise AssertionError(f"the file gave nothing at {offset}, {nbytes} bytes")


def plain(offset: int, nbytes: int) -> StoredTensor:
    return StoredTensor(offset, nbytes, (nbytes,), None, 1)


def cut(size: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Ranges that do not overlap, with gaps between some of them and an empty one."""
    points = sorted(random.Random(seed).sample(range(size), 2 * count))
    ranges = [(first, last - first) for first, last in zip(points[::2], points[1::2], strict=True)]
    return [*ranges, (points[0], 0)]


@pytest.mark.parametrize("arrives", [False, True])
@pytest.mark.parametrize("count", [3, 5000])
def test_they_are_those_of_the_bytes(
    count: int, arrives: bool, data: bytes, descriptor: int, tmp_path: Path
) -> None:
    records = cut(len(data), count, count)
    tensors = [plain(*record) for record in records]
    tensors += [plain(MIB + 7, 20 * MIB), plain(0, len(data))]  # overlap each other and the records
    rows = StoredTensor(4096, 8 * 500 * 300, (500, 300), (1, 500), 8)
    if arrives:
        with CountingStore(LocalStore()).open_reader(str(tmp_path / "file")) as reader:
            found = digest_file(reader, records, [*tensors, rows])
    else:
        found = digest_descriptor(descriptor, len(data), records, [*tensors, rows], None, ended)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.crc32 == zlib.crc32(data)
    assert found.records == {r: zlib.crc32(data[r[0] : r[0] + r[1]]) for r in records}
    for tensor in tensors:
        taken = data[tensor.offset : tensor.offset + tensor.nbytes]
        assert found.tensors[tensor] == hashlib.sha256(taken).hexdigest()
    array = np.frombuffer(data, "<u8", 150_000, 4096).reshape(300, 500).T
    assert found.tensors[rows] == hashlib.sha256(array.tobytes()).hexdigest()


def test_an_interrupt_ends_all_of_it(data: bytes, descriptor: int) -> None:
    seen = 0

    def progress(nbytes: int) -> None:
        nonlocal seen
        seen += nbytes
        raise Interrupted

    with pytest.raises(Interrupted):
        digest_descriptor(descriptor, len(data), [(0, len(data))], [], progress, ended)
    assert seen < len(data)


def test_what_the_file_does_not_give_is_an_error(data: bytes, descriptor: int) -> None:
    with pytest.raises(AssertionError, match="gave nothing"):
        digest_descriptor(descriptor, len(data) + MIB, [(0, len(data))], [], None, ended)


# -- while the file arrives from elsewhere --------------------------------------------------------------


@pytest.mark.usefixtures("descriptor")
def test_what_has_arrived_and_is_not_hashed_is_bounded(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Several threads hash groups side by side, and whoever reads waits for them."""
    most, hashed = 0, 0
    threads: set[int] = set()
    lock = threading.Lock()
    real = RegionLane.take

    def take(self: RegionLane, position: int, chunk: bytes | memoryview) -> None:
        nonlocal most, hashed
        real(self, position, chunk)
        with lock:
            threads.add(threading.get_ident())
            most = max(most, store.nbytes("read") - hashed)
            hashed += len(chunk)

    monkeypatch.setattr(RegionLane, "take", take)
    monkeypatch.setattr("ptbin.proof.stream.WAITING_NBYTES", 10 * MIB)
    monkeypatch.setattr("ptbin.proof.stream.GROUP_NBYTES", 5 * MIB)
    monkeypatch.setattr("ptbin.proof.digests.CHUNK_NBYTES", MIB)
    monkeypatch.setattr(cores, "available_cores", lambda: 4)
    cores.share_cores(1)
    request.addfinalizer(lambda: cores.share_cores(1))
    store = CountingStore(LocalStore())
    records = [(position, MIB) for position in range(0, len(data) - MIB, MIB)]
    with store.open_reader(str(tmp_path / "file")) as reader:
        found = digest_file(reader, records, [plain(*record) for record in records])
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert hashed == len(data)
    assert most <= 10 * MIB + 4 * MIB  # what waits, and what is read next
    assert len(threads) > 1


@pytest.mark.usefixtures("descriptor")
def test_a_fault_while_hashing_reaches_whoever_asked(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(self: RegionLane, position: int, chunk: bytes | memoryview) -> None:
        raise Interrupted

    monkeypatch.setattr(RegionLane, "take", take)
    with (
        CountingStore(LocalStore()).open_reader(str(tmp_path / "file")) as reader,
        pytest.raises(Interrupted),
    ):
        digest_file(reader, [(0, len(data))], [])


# -- while the file is being written -----------------------------------------------------------------


@pytest.fixture(params=["large groups followed", "groups when they are there", "read ahead"])
def follows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptbin.proof.growing.FOLLOWED_NBYTES", 1 if "followed" in request.param else 1 << 40)
    if request.param == "read ahead":  # as with many cores
        monkeypatch.setattr("ptbin.proof.growing.AHEAD_NBYTES", MIB)
        monkeypatch.setattr("ptbin.proof.growing.AHEAD_CORES", 1)


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "growing", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


@pytest.mark.usefixtures("follows")
@pytest.mark.parametrize("step", [777_777, 16 * MIB, 1 << 40])
def test_a_file_is_hashed_while_it_grows(step: int, data: bytes, growing: int) -> None:
    records = cut(len(data), 9, 3)
    rows = StoredTensor(4096, 8 * 500 * 300, (500, 300), (1, 500), 8)
    tensors = [plain(*record) for record in records] + [plain(0, len(data))]
    file = GrowingFile(growing, len(data), records, [*tensors, rows], ended, follow=True)
    for start in range(0, len(data), step):
        file.reached(start + os.pwrite(growing, data[start : start + step], start))
    told: list[int] = []
    found = file.finish(told.append)
    assert sum(told) == len(data)
    whole = digest_descriptor(growing, len(data), records, [*tensors, rows], None, ended)
    assert (found.sha256, found.crc32) == (hashlib.sha256(data).hexdigest(), zlib.crc32(data))
    assert (found.records, found.tensors) == (whole.records, whole.tensors)


@pytest.mark.usefixtures("follows")
def test_one_that_is_never_finished_lets_go_of_the_descriptor(data: bytes, growing: int) -> None:
    threads = set(threading.enumerate())
    file = GrowingFile(growing, len(data), cut(len(data), 9, 3), [], ended, follow=True)
    os.pwrite(growing, data[: 20 * MIB], 0)
    file.reached(20 * MIB)
    file.give_up()
    left = {
        thread
        for thread in set(threading.enumerate()) - threads
        if "ptbin-" in thread.name and "hash" not in thread.name
    }
    assert not left


@pytest.mark.usefixtures("follows")
def test_a_fault_while_it_grows_is_told_at_the_end(data: bytes, growing: int) -> None:
    file = GrowingFile(growing, len(data), [], [], ended, follow=True)
    file.reached(len(data))  # although nothing is there
    with pytest.raises(AssertionError, match="gave nothing"):
        file.finish()
    file.give_up()
