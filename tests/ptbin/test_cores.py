"""One budget of cores: how many there are, how many threads hash at once, and which of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ptbin
from ptbin import cores
from ptbin.proof import growing, written
from ptbin.proof.regions import RegionLane

MIB = 1 << 20


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let there be that many cores."""

    def set_cores(count: int) -> None:
        monkeypatch.setattr(cores, "available_cores", lambda: count)
        cores.share_cores(1)

    yield set_cores
    cores.share_cores(1)


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """By the kind of thread, the chunks that it hashed; `most` is how many hashed at one time."""
    seen: dict[str, int] = {"most": 0}
    at_once = [0]
    lock = threading.Lock()
    real = RegionLane.take

    def take(self: RegionLane, position: int, chunk: bytes | memoryview) -> None:
        kind = threading.current_thread().name.rpartition("_")[0]
        with lock:
            at_once[0] += 1
            seen["most"] = max(seen["most"], at_once[0])
            seen[kind] = seen.get(kind, 0) + 1
        real(self, position, chunk)
        with lock:
            at_once[0] -= 1

    monkeypatch.setattr(RegionLane, "take", take)
    return seen


@pytest.mark.parametrize(
    ("quota", "affinity", "sharing", "count"),
    [("max 100000", 8, 1, 8), ("250000 100000", 8, 1, 3), ("50000 100000", 8, 1, 1), ("max 100000", 8, 3, 2)],
)
def test_cores_are_those_of_affinity_control_group_and_sharing(
    quota: str,
    affinity: int,
    sharing: int,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    request.addfinalizer(lambda: cores.share_cores(1))
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(cores, "Path", lambda text: tmp_path / Path(text).name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    cores.share_cores(sharing)
    assert cores.available_cores() == count


@pytest.mark.parametrize("at_once", [1, 2, 6])
def test_no_more_threads_hash_than_there_are_cores(
    at_once: int,
    fresh: Callable[[int], None],
    hashing: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many small ones keep to the threads that write them; a huge one has the pool whatever else is there."""
    fresh(3)
    monkeypatch.setattr(written, "FOLLOWED_NBYTES", MIB)
    monkeypatch.setattr(written, "HUGE_NBYTES", 24 * MIB)
    monkeypatch.setattr(growing, "GROUP_NBYTES", MIB)
    small = {f"{i}": torch.randn(256, 1024) for i in range(4)}
    torch.save(small, tmp_path / "small.pt")
    torch.save({f"{i}": torch.randn(1024, 1024) for i in range(8)}, tmp_path / "huge.pt")
    names = ["huge.pt", *["small.pt"] * 9]
    barrier = threading.Barrier(at_once)

    def convert(index: int) -> None:
        if index < at_once:
            barrier.wait(30)
        ptbin.convert(str(tmp_path / names[index]), str(tmp_path / "out" / f"{index}.bin"))

    with ThreadPoolExecutor(at_once, thread_name_prefix="worker") as pool:
        list(pool.map(convert, range(len(names))))
    assert hashing.pop("most") <= 3
    assert hashing["ptbin-hash"] > 0
    if at_once == 6:
        assert hashing["worker"] > 0


def test_files_at_work_are_counted(fresh: Callable[[int], None]) -> None:
    fresh(4)
    assert (cores.spare_cores(), cores.is_crowded()) == (4, False)
    with cores.at_work(), cores.at_work():
        assert (cores.spare_cores(), cores.is_crowded()) == (2, False)
        with cores.at_work():
            assert (cores.spare_cores(), cores.is_crowded()) == (1, True)
    assert cores.spare_cores() == 4
