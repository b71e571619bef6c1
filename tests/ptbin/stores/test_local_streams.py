"""One large move in several streams, and blocks reserved step by step: the file is the same."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from ptbin.errors import StorageError
from ptbin.stores import reserving
from ptbin.stores.local import LocalStore
from ptbin.stores.local_writer import COPY_NBYTES

MIB = 1 << 20
SIZE = 3 * COPY_NBYTES + 12_345


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(3).randbytes(SIZE)


@pytest.fixture
def source(data: bytes, tmp_path: Path) -> str:
    (tmp_path / "source").write_bytes(data)
    return str(tmp_path / "source")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptbin.stores.local_writer.copy_streams", lambda: 3)
    monkeypatch.setattr("ptbin.stores.local_writer.STREAMED_NBYTES", 1)


def copy(source: str, dest: Path) -> list[int]:
    """Write a file around the source from its fifth byte on; how far it was, each time."""
    store = LocalStore()
    reached: list[int] = []
    with store.open_reader(source) as reader, store.open_writer(str(dest)) as writer:
        writer.reached = reached.append
        writer.write(b"before")
        assert writer.copy_from(reader, 5, SIZE - 5)
        writer.write(b"after")
        writer.commit()
    return reached


@pytest.mark.usefixtures("streams")
def test_streams_make_one_file_in_order(source: str, data: bytes, tmp_path: Path) -> None:
    reached = copy(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"before" + data[5:] + b"after"
    assert reached == sorted(reached)
    assert reached[-1] == SIZE - 5 + 11


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("failing", range(4))
def test_what_the_kernel_refuses_half_way_is_streamed(
    failing: int, source: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.copy_file_range

    def refuses(src: int, dst: int, count: int, offset_src: int, offset_dst: int) -> int:
        if offset_src - 5 == failing * COPY_NBYTES:
            return real(src, dst, 777, offset_src, offset_dst)
        if offset_src - 5 == failing * COPY_NBYTES + 777:
            raise OSError(errno.EINVAL, "made up")
        return real(src, dst, count, offset_src, offset_dst)

    monkeypatch.setattr(os, "copy_file_range", refuses)
    copy(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"before" + data[5:] + b"after"


def test_blocks_are_reserved_ahead_of_the_writer(
    source: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in tmpfs, where reserving takes long."""
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(reserving, "_is_tmpfs", lambda descriptor: True)
    monkeypatch.setattr(reserving, "STEP_NBYTES", 20 * MIB)
    real = reserving.Reservation._reserve

    def noted(self: reserving.Reservation, offset: int, nbytes: int) -> None:
        steps.append((offset, nbytes))
        real(self, offset, nbytes)

    monkeypatch.setattr(reserving.Reservation, "_reserve", noted)
    with LocalStore().open_writer(str(tmp_path / "out"), size_hint=SIZE) as writer:
        assert steps == [(0, 20 * MIB)]
        writer.write(data)
        writer.commit()
    assert [offset for offset, _ in steps] == [0, 20 * MIB, 40 * MIB]
    assert sum(nbytes for _, nbytes in steps) == SIZE
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no tmpfs")
def test_a_tmpfs_too_small_says_so_before_anything_is_written() -> None:
    place = Path("/dev/shm") / f"ptbin-{os.urandom(6).hex()}"
    with pytest.raises(StorageError, match=r"(?i)no space"):
        LocalStore().open_writer(str(place), size_hint=1 << 60)
    assert not place.exists()
