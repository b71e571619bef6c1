"""A disk that is too small says so before the bytes of an output come."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ptbin.errors import StorageError
from ptbin.stores import reserving
from ptbin.stores.local import LocalStore


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
    monkeypatch.setattr(reserving, "filesystem_kind", lambda descriptor: kind)
    place = str(tmp_path / "out")
    if refused:
        with pytest.raises(StorageError):
            LocalStore().open_writer(place, size_hint=1 << 60)
        return
    with LocalStore().open_writer(place, size_hint=1 << 60) as writer:
        writer.write(b"x")
        writer.commit()
    assert Path(place).read_bytes() == b"x"
