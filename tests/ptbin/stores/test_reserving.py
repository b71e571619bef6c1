"""Blocks of a local output are reserved before its bytes come: step by step where that takes long."""

from __future__ import annotations

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


def test_blocks_are_reserved_ahead_of_the_writer(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in tmpfs, where reserving takes long."""
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(reserving, "_filesystem", lambda descriptor: reserving.TMPFS)
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


@pytest.mark.parametrize(
    ("kind", "refused"), [(reserving.XFS, False), (reserving.BTRFS, False), (None, True)]
)
def test_blocks_that_may_be_shared_need_no_room(
    kind: int | None, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserving, "_filesystem", lambda descriptor: kind)
    place = str(tmp_path / "out")
    if refused:
        with pytest.raises(StorageError):
            LocalStore().open_writer(place, size_hint=1 << 60)
        return
    with LocalStore().open_writer(place, size_hint=1 << 60) as writer:
        writer.write(b"x")
        writer.commit()
    assert Path(place).read_bytes() == b"x"
