"""Whole conversions through every pair of stores: the same bytes, few requests, no more read than needed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin.errors import SourceChangedError, StorageError
from ptbin.stores import open_store
from ptbin.stores.local import LocalStore
from tests.bits import assert_same_tensors
from tests.checkpoints.dtypes import random_bits
from tests.fakes import CountingStore, FaultyStore, registered
from tests.servers.endpoint import S3Endpoint

MIB = 1 << 20


@dataclass(frozen=True)
class Place:
    """Somewhere to put files, and how to get in."""

    folder: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def put(self, name: str, data: bytes) -> str:
        store, path = open_store(f"{self.folder}/{name}", self.options)
        store.write_bytes(path, data)
        return f"{self.folder}/{name}"

    def get(self, name: str) -> bytes:
        store, path = open_store(f"{self.folder}/{name}", self.options)
        return store.read_bytes(path)

    def names(self) -> list[str]:
        store, path = open_store(self.folder, self.options)
        return sorted(item.path for item in store.iter_objects(path))


PLACES = ["local", "memory", "s3"]


def _place(kind: str, request: pytest.FixtureRequest) -> Place:
    if kind == "local":
        folder = request.getfixturevalue("tmp_path") / os.urandom(4).hex()
        folder.mkdir()
        return Place(str(folder))
    if kind == "memory":
        return Place(f"memory://{os.urandom(6).hex()}")
    server: S3Endpoint = request.getfixturevalue("moto_s3")
    return Place(f"s3://{server.make_bucket()}/some/prefix", server.storage_options)


@pytest.fixture
def source(request: pytest.FixtureRequest) -> Place:
    return _place(request.param, request)


@pytest.fixture
def dest(request: pytest.FixtureRequest) -> Place:
    return _place(request.param, request)


def _weights() -> dict[str, torch.Tensor]:
    """2.8 MB: large and small tensors, and more than one chunk to fetch."""
    return {
        "embed": random_bits(torch.float32, (500, 400), seed=1),
        "norm": random_bits(torch.float32, (400,), seed=2),
        "half": random_bits(torch.bfloat16, (1000, 800), seed=3),
        "tracked": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "head": random_bits(torch.float32, (400, 300), seed=4),
    }


def _with_adam(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The state comes first, so that the weights do not begin where the archive does."""
    state = {i: {"exp_avg": t.clone(), "exp_avg_sq": t.clone()} for i, t in enumerate(weights.values())}
    return {"optimizer": {"state": state, "param_groups": []}, "model": weights, "epoch": 3}


def _torch_zip(path: Path) -> None:
    torch.save(_with_adam(_weights()), path)


def _legacy(path: Path) -> None:
    torch.save(_with_adam(_weights()), path, _use_new_zipfile_serialization=False)


def _crc_off(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        _torch_zip(path)
    finally:
        torch.serialization.set_crc32_options(True)


def _views(path: Path) -> None:
    base = random_bits(torch.float32, (900, 500), seed=9)
    weights = {
        "transposed": base.t(),
        "rows": base[100:200],
        "columns": base[:, ::3],
        "tied": base.t(),
        "plain": random_bits(torch.float32, (300, 300), seed=10),
    }
    torch.save({"model": weights, "optimizer": {"state": {}}}, path)


KINDS: dict[str, Callable[[Path], None]] = {
    "torch_zip": _torch_zip,
    "legacy": _legacy,
    "crc_off": _crc_off,
    "views": _views,
}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A checkpoint of each kind, and its output as made between two local files."""
    folder = tmp_path_factory.mktemp("made")
    KINDS[request.param](folder / "model.pt")
    ptbin.convert(str(folder / "model.pt"), str(folder / "model.bin"))
    expected = torch.load(folder / "model.pt", weights_only=True)["model"]
    assert_same_tensors(torch.load(folder / "model.bin", weights_only=True), expected)
    return (folder / "model.pt").read_bytes(), (folder / "model.bin").read_bytes()


@pytest.mark.parametrize("source", PLACES, indirect=True)
@pytest.mark.parametrize("dest", PLACES, indirect=True)
def test_the_same_bytes_through_every_pair(made: tuple[bytes, bytes], source: Place, dest: Place) -> None:
    checkpoint, expected = made
    manifest = ptbin.convert(
        source.put("model.pt", checkpoint),
        f"{dest.folder}/model.bin",
        source_options=source.options,
        dest_options=dest.options,
    )
    assert dest.get("model.bin") == expected
    assert dest.names() == ["model.bin", "model.bin.manifest.json"]
    assert (
        ptbin.verify(f"{dest.folder}/model.bin.manifest.json", level="load", storage_options=dest.options)
        == []
    )
    assert manifest["bytes_written"] == len(expected)
    # of an output proven already nothing needs to be fetched again
    assert manifest["verification"]["status"] == "verified"


def test_a_stage_and_its_commit_may_be_two_processes(made: tuple[bytes, bytes], tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(made[0])
    draft = ptbin.stage(str(tmp_path / "model.pt"), str(tmp_path / "out" / "model.bin"))
    assert not (tmp_path / "out" / "model.bin.manifest.json").exists()
    manifest = ptbin.commit(ptbin.Draft.from_json(draft.to_json()))
    assert (tmp_path / "out" / "model.bin").read_bytes() == made[1]
    assert manifest["verification"]["status"] == "verified"


# --------------------------------------------------------------------------------- bytes and requests


def _checkpoint_of(folder: Path, nbytes: int, count: int = 40) -> int:
    """A training dict with `nbytes` of weights in `count` tensors and twice that of Adam state."""
    elements = nbytes // count // 4
    weights = {f"layer.{i}.weight": random_bits(torch.float32, (elements,), seed=i) for i in range(count)}
    torch.save(_with_adam(weights), folder / "model.pt")
    return elements * 4 * count


def _remote(path: Path) -> tuple[CountingStore, str]:
    """The file in a store where each request costs, and the counts begin after it came there."""
    inner, name = open_store(f"memory://{os.urandom(6).hex()}/model.pt")
    inner.write_bytes(name, path.read_bytes())
    return CountingStore(inner), f"counted://{name}"


@pytest.mark.parametrize("verify", ["none", "checksum"])
def test_only_the_index_and_the_weights_are_read(tmp_path: Path, verify: Any) -> None:
    nbytes = _checkpoint_of(tmp_path, 20 * MIB)
    store, uri = _remote(tmp_path / "model.pt")
    with registered("counted", store):
        ptbin.convert(uri, str(tmp_path / "o.bin"), ptbin.ConvertOptions(verify=verify))
    assert nbytes <= store.nbytes("read") <= 1.02 * nbytes + MIB
    assert store.count("read") <= nbytes // (4 * MIB) + 4
    assert store.count("open") == 1
    assert (tmp_path / "o.bin").stat().st_size < 1.02 * nbytes + MIB


def test_s3_source_in_few_requests(tmp_path: Path, moto_s3: S3Endpoint) -> None:
    nbytes = _checkpoint_of(tmp_path, 20 * MIB)
    bucket = moto_s3.make_bucket()
    store = CountingStore(moto_s3.store())
    store.write_bytes(f"{bucket}/model.pt", (tmp_path / "model.pt").read_bytes())
    store.calls.clear()
    with registered("counted", store):
        manifest = ptbin.convert(f"counted://{bucket}/model.pt", str(tmp_path / "o.bin"))
    assert nbytes <= manifest["bytes_read"] <= 1.02 * nbytes + MIB
    # S3's first answer brings 256 KiB along, whether all of it is asked for or not.
    assert 0 <= manifest["bytes_read"] - store.nbytes("read") <= 256 * 1024
    # 8 MiB a request, the directory, the pickle, a header or two
    assert store.count("read") <= 3 + 10
    assert torch.load(tmp_path / "o.bin", weights_only=True).keys() == {
        f"layer.{i}.weight" for i in range(40)
    }


def test_many_small_tensors_are_read_together(tmp_path: Path) -> None:
    """Requests do not grow with the number of tensors, but with the bytes."""
    counts = []
    for count in (50, 1000):
        nbytes = _checkpoint_of(tmp_path, MIB, count)
        store, uri = _remote(tmp_path / "model.pt")
        with registered("counted", store):
            ptbin.convert(uri, str(tmp_path / "o.bin"))
        assert store.nbytes("read") <= 1.02 * nbytes + MIB
        counts.append(store.count("read"))
    assert counts[1] <= counts[0] + 2


@pytest.mark.parametrize("tensors", [4, 12_000])
def test_an_index_costs_three_requests_beside_the_pickle(tmp_path: Path, tensors: int) -> None:
    """Small or with a directory and a pickle of megabytes, and whatever order the archive has."""
    state = {f"layer.{index}.with.a.long.name.weight": torch.zeros(100) for index in range(tensors)}
    torch.save({"state_dict": state, "optimizer": {"state": {}}}, tmp_path / "model.pt")
    store, uri = _remote(tmp_path / "model.pt")
    with registered("counted", store):
        ptbin.inspect(uri)
    assert store.count("read") <= 3 + 1


def test_inspect_reads_the_index_alone(tmp_path: Path) -> None:
    nbytes = _checkpoint_of(tmp_path, 20 * MIB)
    store, uri = _remote(tmp_path / "model.pt")
    with registered("counted", store):
        seen = ptbin.inspect(uri)
    assert len(seen["tensors"]) == 40
    assert store.nbytes("read") < MIB < nbytes
    assert store.count("read") <= 6


def test_progress_adds_up_to_what_is_moved_and_proven(tmp_path: Path) -> None:
    _checkpoint_of(tmp_path, 4 * MIB)
    for protocol in ("", "counted://"):
        moved: list[int] = []
        with registered("counted", CountingStore(LocalStore())):
            ptbin.convert(
                f"{protocol}{tmp_path}/model.pt",
                str(tmp_path / "o.bin"),
                ptbin.ConvertOptions(verify="none"),
                progress=moved.append,
            )
        assert sum(moved) == (tmp_path / "o.bin").stat().st_size


# --------------------------------------------------------------------------------- things that go wrong


def _overwrite(place: Place, name: str, data: bytes) -> Callable[[], object]:
    return lambda: place.put(name, data)


@pytest.mark.parametrize("kind", ["local", "s3"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_source_overwritten_meanwhile(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, at: int
) -> None:
    """At the `at`-th read of it, by another checkpoint of the very same size."""
    source = _place(kind, request)
    _checkpoint_of(tmp_path, 20 * MIB)
    old = (tmp_path / "model.pt").read_bytes()
    new = old.replace(old[-9 * MIB : -9 * MIB + 16], bytes(16))
    assert len(new) == len(old)
    assert new != old
    inner, path = open_store(source.put("model.pt", old), source.options)
    store = FaultyStore(inner, {"read": [None] * (at - 1) + [_overwrite(source, "model.pt", new)]})
    output = tmp_path / "out" / "model.bin"
    with registered("faulty", store), pytest.raises(SourceChangedError):
        ptbin.convert(f"faulty://{path}", str(output))
    assert store.struck["read"] == 1
    assert not output.parent.exists()


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_source_rewritten_in_place_is_not_blamed_as_damaged(tmp_path: Path, at: int) -> None:
    """The open file itself changes under the reader, so that what it reads makes no sense."""
    _checkpoint_of(tmp_path, 20 * MIB)
    source = tmp_path / "model.pt"
    store = FaultyStore(
        LocalStore(), {"read": [None] * at + [lambda: source.write_bytes(b"new" * 7_000_000)]}
    )
    with registered("faulty", store), pytest.raises(SourceChangedError):
        ptbin.convert(f"faulty://{source}", str(tmp_path / "out" / "model.bin"))
    assert store.struck["read"] == 1
    assert not (tmp_path / "out").exists()


def test_a_source_deleted_meanwhile(tmp_path: Path, moto_s3: S3Endpoint) -> None:
    _checkpoint_of(tmp_path, 20 * MIB)
    bucket, inner = moto_s3.make_bucket(), moto_s3.store()
    inner.write_bytes(f"{bucket}/model.pt", (tmp_path / "model.pt").read_bytes())
    store = FaultyStore(inner, {"read": [None, None, lambda: inner.delete(f"{bucket}/model.pt")]})
    with registered("faulty", store), pytest.raises(SourceChangedError):
        ptbin.convert(f"faulty://{bucket}/model.pt", str(tmp_path / "out" / "model.bin"))
    assert not (tmp_path / "out").exists()


_FULL = StorageError(os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "schedule",
    [
        {"create": [_FULL]},
        {"write": [_FULL]},
        {"write": [None, _FULL]},
        {"commit": [_FULL]},
    ],
    ids=["create", "first write", "second write", "commit"],
)
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_destination_that_fails_keeps_nothing_half_written(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, schedule: dict[str, Any]
) -> None:
    dest = _place(kind, request)
    _checkpoint_of(tmp_path, 20 * MIB)
    inner, path = open_store(f"{dest.folder}/model.bin", dest.options)
    store = FaultyStore(inner, schedule)
    with registered("faulty", store), pytest.raises(StorageError, match="No space left"):
        ptbin.convert(str(tmp_path / "model.pt"), f"faulty://{path}")
    assert sum(store.struck.values()) == 1
    assert dest.names() == []
    if kind == "s3":
        server: S3Endpoint = request.getfixturevalue("moto_s3")
        assert server.uploads_in(path.partition("/")[0]) == []
    # and the rerun goes on from there
    ptbin.convert(str(tmp_path / "model.pt"), f"{dest.folder}/model.bin", dest_options=dest.options)
    assert dest.names() == ["model.bin", "model.bin.manifest.json"]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_an_output_is_done_although_the_claim_of_its_place_cannot_be_deleted(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    dest = _place(kind, request)
    _checkpoint_of(tmp_path, MIB)
    inner, path = open_store(f"{dest.folder}/model.bin", dest.options)
    store = FaultyStore(inner, {"delete": [_FULL]})
    with registered("faulty", store):
        ptbin.convert(str(tmp_path / "model.pt"), f"faulty://{path}")
    assert sum(store.struck.values()) == 1
    assert ptbin.verify(f"{dest.folder}/model.bin.manifest.json", storage_options=dest.options) == []


@pytest.mark.parametrize("schedule", [{"write": [None, _FULL]}, {"commit": [_FULL]}], ids=["write", "commit"])
def test_an_earlier_output_outlives_a_conversion_that_fails(tmp_path: Path, schedule: dict[str, Any]) -> None:
    _checkpoint_of(tmp_path, MIB)
    output = tmp_path / "out" / "model.bin"
    ptbin.convert(str(tmp_path / "model.pt"), str(output))
    before = output.read_bytes()
    _checkpoint_of(tmp_path, 2 * MIB)
    with registered("faulty", FaultyStore(LocalStore(), schedule)), pytest.raises(StorageError):
        ptbin.convert(str(tmp_path / "model.pt"), f"faulty://{output}")
    assert output.read_bytes() == before


def test_a_manifest_that_cannot_be_written_means_not_done(tmp_path: Path) -> None:
    _checkpoint_of(tmp_path, MIB)
    output = tmp_path / "out" / "model.bin"
    store = FaultyStore(LocalStore(), {"commit": [None, _FULL]})
    with registered("faulty", store), pytest.raises(StorageError):
        ptbin.convert(str(tmp_path / "model.pt"), f"faulty://{output}")
    assert store.struck["commit"] == 1
    assert [path.name for path in output.parent.iterdir() if path.suffix == ".json"] == []


def test_an_output_damaged_while_it_was_stored_is_taken_away(tmp_path: Path) -> None:
    """What was written is right, what is there is not: only reading it back tells."""
    _checkpoint_of(tmp_path, MIB)
    output = tmp_path / "out" / "model.bin"

    def damage() -> None:
        data = bytearray(output.read_bytes())
        data[len(data) // 2] ^= 1
        output.write_bytes(data)

    # The first two readers of the destination's store look for an earlier manifest and for a claim, the
    # third is the proof's.
    store = FaultyStore(LocalStore(), {"open": [None, None, damage]})
    with registered("faulty", store), pytest.raises(ptbin.errors.VerificationError):
        ptbin.convert(str(tmp_path / "model.pt"), f"faulty://{output}")
    assert store.struck["open"] == 1
    assert list(output.parent.iterdir()) == []


# ------------------------------------------------------------------------------------- a real S3 server


@pytest.mark.s3_real
def test_through_a_real_s3_server(tmp_path: Path, rados_s3: S3Endpoint) -> None:
    """180 MiB, a third of it weights: every way through a server that checks what it is sent."""
    nbytes = _checkpoint_of(tmp_path, 60 * MIB, 60)
    source, options = tmp_path / "model.pt", rados_s3.storage_options
    bucket = rados_s3.make_bucket()
    with rados_s3.store().open_writer(f"{bucket}/in/model.pt", size_hint=source.stat().st_size) as writer:
        with source.open("rb") as file:
            while chunk := file.read(8 * MIB):
                writer.write(chunk)
        writer.commit()
    ptbin.convert(str(source), str(tmp_path / "reference.bin"))
    reference = (tmp_path / "reference.bin").read_bytes()
    remote = f"s3://{bucket}/in/model.pt"
    for begin, end in (
        (remote, f"s3://{bucket}/out/model.bin"),
        (remote, str(tmp_path / "out" / "model.bin")),
        (str(source), f"s3://{bucket}/out2/model.bin"),
    ):
        manifest = ptbin.convert(begin, end, source_options=options, dest_options=options)
        copied = manifest["bytes_copied_in_store"]
        assert (copied > 0.9 * nbytes - 5 * MIB) is (begin.startswith("s3") and end.startswith("s3"))
        assert nbytes - copied <= manifest["bytes_read"] <= 1.02 * nbytes - copied + MIB
        assert Place(end.rpartition("/")[0], options).get("model.bin") == reference
        assert ptbin.verify(f"{end}.manifest.json", level="load", storage_options=options) == []
    assert rados_s3.uploads_in(bucket) == []
    rados_s3.empty(bucket)
