"""How often the bytes of a checkpoint pass: counted by the kernel for local files, by a store for others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin.options import ConvertOptions
from ptbin.stores.local import LocalStore
from tests.fakes import CountingStore, registered

WEIGHTS = 40 << 20
SLACK = 1 << 20
COUNTERS = Path("/proc/self/io")


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Everything is imported by a first conversion: modules are files that are read as well."""
    small = tmp_path_factory.mktemp("small") / "x.pt"
    torch.save({"w": torch.ones(3)}, small)
    for verify in ("none", "checksum"):
        ptbin.convert(small, f"{small}.{verify}.bin", ConvertOptions(verify=verify))
    ptbin.verify(f"{small}.checksum.bin")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = {f"{i}.weight": torch.randn(1280, 1024) for i in range(8)}
    torch.save(
        {"model": model, "optimizer": {"state": {0: {"exp_avg": torch.ones(500_000)}}}}, tmp_path / "x.pt"
    )
    return tmp_path / "x.pt"


def passed(work: Callable[[], object]) -> tuple[float, float]:
    """Times that the weights were read and written, a copy within the kernel being one of each.

    To be told from the rest, they are far more than everything else that is read and written meanwhile.
    """

    def counted() -> tuple[int, int]:
        words = dict(line.split(": ") for line in COUNTERS.read_text().splitlines())
        return int(words["rchar"]), int(words["wchar"])

    before = counted()
    work()
    read, written = (after - was for after, was in zip(counted(), before, strict=True))
    return round((read - SLACK // 2) / WEIGHTS, 1), round((written - SLACK // 2) / WEIGHTS, 1)


@pytest.mark.skipif(not COUNTERS.exists(), reason="Linux counts what a process reads and writes")
@pytest.mark.parametrize(
    ("wishes", "read", "written"),
    [
        ({"verify": "none"}, (1, 1), 1),
        ({}, (2, 3), 1),
        ({"file_digest": "none"}, (2, 2), 1),
        ({"max_shard_size": 12 << 20}, (2, 3), 1),
        ({"dtype": "bfloat16"}, (1.5, 2), 0.5),
    ],
    ids=str,
)
def test_a_local_output_is_copied_once_and_read_for_its_proof(
    wishes: dict[str, Any], read: tuple[float, float], written: float, source: Path, tmp_path: Path
) -> None:
    """The source is not read a second time. The lane of the file and those of the tensors read what they hash
    each by itself, at most; without the file's digest all is read once.
    """
    options = ConvertOptions(**wishes)
    times = passed(lambda: ptbin.convert(source, tmp_path / "out.bin", options))
    assert read[0] <= times[0] <= read[1]
    assert times[1] == written


@pytest.mark.skipif(not COUNTERS.exists(), reason="Linux counts what a process reads and writes")
@pytest.mark.parametrize(("file_digest", "most"), [("sha256", 2), ("none", 1)])
def test_verify_reads_what_the_proof_read(file_digest: Any, most: int, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    ptbin.convert(source, out, ConvertOptions(file_digest=file_digest))
    read, written = passed(lambda: ptbin.verify(out))
    assert 1 <= read <= most
    assert written == 0


@pytest.mark.parametrize(("verify", "read_back"), [("none", 0), ("checksum", 1)])
def test_of_another_store_each_byte_is_fetched_once(
    verify: Any, read_back: int, source: Path, tmp_path: Path
) -> None:
    """A checkpoint elsewhere is hashed as it arrives; an output elsewhere is read back once, and not its
    source.
    """
    options = ConvertOptions(verify=verify)
    with registered("counted", CountingStore(LocalStore())) as store:
        ptbin.convert(f"counted://{source}", tmp_path / "here.bin", options)
        assert WEIGHTS <= store.nbytes("read", "x.pt") < WEIGHTS + SLACK
        store.calls.clear()
        ptbin.convert(source, f"counted://{tmp_path}/there.bin", options)
        assert (
            WEIGHTS
            <= store.nbytes("write", "there.bin") + store.nbytes("copy", "there.bin")
            < WEIGHTS + SLACK
        )
        read = store.nbytes("read", "there.bin")
        assert read_back * WEIGHTS <= read < read_back * WEIGHTS + SLACK
