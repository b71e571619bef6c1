"""Conversions through a store that fails at random: right all the same, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ptbin
from ptbin.options import ConvertOptions
from tests.checkpoints.dtypes import random_bits
from tests.servers.endpoint import S3Endpoint
from tests.servers.random_faults import Faults, random_faults

MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 MiB of weights and as much of Adam's state."""
    folder = tmp_path_factory.mktemp("unreliable")
    weights = {f"{index}.weight": random_bits(torch.float32, (1024, 2048), seed=index) for index in range(6)}
    weights |= {f"{index}.bias": random_bits(torch.float32, (1024,), seed=index) for index in range(6)}
    moments = {index: {"exp_avg": tensor * 0.5} for index, tensor in enumerate(weights.values())}
    torch.save({"model": weights, "optimizer": {"state": moments}}, folder / "last.pt")
    ptbin.convert(str(folder / "last.pt"), str(folder / "last.bin"))
    return folder


@pytest.mark.s3_real
@pytest.mark.parametrize("route", ["s3 to s3", "s3 to local", "local to s3"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_conversion_is_right(
    rados_s3: S3Endpoint, checkpoint: Path, tmp_path: Path, route: str, seed: int
) -> None:
    bucket = rados_s3.make_bucket()
    store = rados_s3.store()
    store.write_bytes(f"{bucket}/in/last.pt", (checkpoint / "last.pt").read_bytes())
    begin, _, end = route.partition(" to ")
    source = f"s3://{bucket}/in/last.pt" if begin == "s3" else str(checkpoint / "last.pt")
    dest = f"s3://{bucket}/out/last.bin" if end == "s3" else str(tmp_path / "last.bin")
    with random_faults(rados_s3.url, Faults(seed, p503=0.1, cut=0.1, spike=0.05, spike_s=0.2)) as proxy:
        options = S3Endpoint(proxy.url).storage_options
        manifest = ptbin.convert(
            source, dest, ConvertOptions(verify="checksum"), source_options=options, dest_options=options
        )
        assert proxy.counts.faults > 0
    assert manifest["verification"]["status"] == "verified"
    found = store.read_bytes(f"{bucket}/out/last.bin") if end == "s3" else Path(dest).read_bytes()
    assert found == (checkpoint / "last.bin").read_bytes()
    # What was begun without our hearing of it is for the next run to discard.
    store.discard_unfinished(bucket, lambda path: path == "out/last.bin")
    assert rados_s3.uploads_in(bucket) == []
    rados_s3.empty(bucket)
