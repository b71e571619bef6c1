"""Outputs that an object store puts together by itself: what is copied, what proves it, what goes wrong."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

import ptbin
from ptbin.errors import ChecksumMismatchError, SourceChangedError
from ptbin.options import ConvertOptions
from ptbin.stores import Identity, RangeReader, Writer
from ptbin.stores.local import LocalReader, LocalStore
from ptbin.stores.parts import Extent, Part, PartRules, plan_parts
from tests.bits import assert_same_tensors
from tests.checkpoints.dtypes import random_bits
from tests.fakes import registered
from tests.servers.asked import Asked, Bend, asked, refusal
from tests.servers.endpoint import S3Endpoint
from tests.servers.faulty_proxy import Fault, Request, faulty_proxy

MIB = 1 << 20
WEIGHTS_NBYTES = 24 * MIB


def _weights(nbytes: int = WEIGHTS_NBYTES) -> dict[str, torch.Tensor]:
    """Large matrices with small vectors between them, all of it neighbours in the archive."""
    side = 1024
    weights = {}
    for index in range(nbytes // (4 * side * side)):
        weights[f"{index}.weight"] = random_bits(torch.float32, (side, side), seed=index)
        weights[f"{index}.bias"] = random_bits(torch.float32, (side,), seed=100 + index)
    return weights


def _adam(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    moments = {index: {"exp_avg": tensor * 0.5} for index, tensor in enumerate(weights.values())}
    torch.save({"epoch": 3, "state_dict": dict(weights), "optimizer": {"state": moments}}, path)


@dataclass(frozen=True)
class Trained:
    """A checkpoint of weights and Adam's moments, and the output that it must become."""

    weights: dict[str, torch.Tensor]
    archive: bytes
    output: bytes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    weights = _weights()
    _adam(folder / "last.ckpt", weights)
    ptbin.convert(str(folder / "last.ckpt"), str(folder / "last.bin"))
    return Trained(weights, *((folder / name).read_bytes() for name in ("last.ckpt", "last.bin")))


@dataclass
class Scene:
    """The checkpoint in a bucket."""

    endpoint: S3Endpoint
    bucket: str
    trained: Trained
    options: dict[str, Any]

    @property
    def source(self) -> str:
        return f"s3://{self.bucket}/in/last.ckpt"

    @property
    def dest(self) -> str:
        return f"s3://{self.bucket}/out/last.bin"

    def put(self, data: bytes) -> None:
        self.endpoint.store().write_bytes(f"{self.bucket}/in/last.ckpt", data)

    def convert(self, verify: Any = "checksum") -> dict[str, Any]:
        return ptbin.convert(
            self.source,
            self.dest,
            ConvertOptions(verify=verify),
            source_options=self.options,
            dest_options=self.options,
        )

    def watched(self, bend: Bend | None = None) -> AbstractContextManager[Asked]:
        """What conversions ask the store for, meanwhile."""
        return asked(self.options, bend)

    def output(self) -> bytes:
        return self.endpoint.store().read_bytes(f"{self.bucket}/out/last.bin")

    def names(self) -> list[str]:
        return [item.path for item in self.endpoint.store().iter_objects(f"{self.bucket}/out")]


def _scene(endpoint: S3Endpoint, trained: Trained, **bucket_options: Any) -> Scene:
    bucket = endpoint.make_bucket(**bucket_options)
    # Each scene has a client to itself: tests look at what it asks for, or change it.
    options = endpoint.storage_options | {"config_kwargs": {"user_agent_extra": bucket}}
    scene = Scene(endpoint, bucket, trained, options)
    scene.put(trained.archive)
    return scene


@pytest.fixture
def moto(moto_s3: S3Endpoint, trained: Trained) -> Scene:
    """A store that keeps a CRC-32 of whole objects."""
    return _scene(moto_s3, trained)


@pytest.fixture
def rados(rados_s3: S3Endpoint, trained: Trained) -> Iterator[Scene]:
    """A store that does not, and that ignores `CopySourceIfMatch`."""
    scene = _scene(rados_s3, trained)
    yield scene
    rados_s3.empty(scene.bucket)


def test_the_store_copies_and_its_checksum_proves(moto: Scene) -> None:
    with moto.watched() as sent:
        manifest = moto.convert()
    assert manifest["verification"]["proven_by"] == "store checksum"
    assert manifest["bytes_copied_in_store"] > WEIGHTS_NBYTES - 6 * MIB
    # 5 MiB are the least that the first part may hold; all else is index.
    assert sent.client_nbytes < 2 * 5 * MIB + MIB
    assert sent.count("upload_part_copy") >= 1
    assert moto.output() == moto.trained.output
    assert moto.endpoint.uploads_in(moto.bucket) == []
    assert "notes" not in manifest
    again = ptbin.verify(f"{moto.dest}.manifest.json", level="load", storage_options=moto.options)
    assert again == []


@pytest.mark.s3_real
def test_without_a_checksum_of_the_store_the_output_is_read_back(rados: Scene) -> None:
    manifest = rados.convert()
    assert manifest["verification"]["proven_by"] == "read back"
    assert manifest["bytes_copied_in_store"] > 0.7 * WEIGHTS_NBYTES
    assert rados.output() == rados.trained.output
    assert rados.endpoint.uploads_in(rados.bucket) == []


@pytest.mark.s3_real
def test_without_proof_hardly_a_byte_passes_through(rados: Scene) -> None:
    with rados.watched() as sent:
        manifest = rados.convert("none")
    assert sent.client_nbytes < 2 * 5 * MIB + MIB
    assert manifest["bytes_read"] < 6 * MIB
    assert manifest["verification"] == manifest["verification"] | {"level": "none", "status": "not verified"}
    assert rados.output() == rados.trained.output


@pytest.mark.parametrize("versioned", [False, True])
def test_each_copy_is_pinned(moto_s3: S3Endpoint, trained: Trained, versioned: bool) -> None:
    scene = _scene(moto_s3, trained, versioned=versioned)
    with scene.watched() as sent:
        scene.convert()
    copies = sent.of("upload_part_copy")
    assert copies
    for parameters in copies:
        assert parameters["CopySourceIfMatch"].startswith('"')
        assert ("VersionId" in parameters["CopySource"]) is versioned


@pytest.mark.s3_real
def test_a_source_that_changes_meanwhile_is_noticed(rados: Scene) -> None:
    overwritten: list[str] = []

    def overwrite(method: str, parameters: dict[str, Any]) -> None:
        if method == "upload_part_copy" and not overwritten:
            overwritten.append(method)
            rados.put(b"\0" * len(rados.trained.archive))

    with rados.watched(overwrite), pytest.raises(SourceChangedError):
        rados.convert()
    assert rados.names() == []
    assert rados.endpoint.uploads_in(rados.bucket) == []


@pytest.mark.s3_real
@pytest.mark.parametrize(
    ("name", "copied"),
    [("ü +&#=~'(*", True), ("%20", False), ("%", False), ("?versionId=", False), ("?", False)],
)
def test_odd_keys_are_never_taken_for_others(rados: Scene, name: str, copied: bool) -> None:
    """Ceph's gateway decodes a copy's source twice: "%20" there means the object with a blank in its name."""
    rados.endpoint.store().write_bytes(f"{rados.bucket}/in/ x.ckpt", b"another object")
    key = f"in/{name}x.ckpt"
    rados.endpoint.store().write_bytes(f"{rados.bucket}/{key}", rados.trained.archive)
    manifest = ptbin.convert(
        f"s3://{rados.bucket}/{key}",
        rados.dest,
        ConvertOptions(verify="none"),
        source_options=rados.options,
        dest_options=rados.options,
    )
    assert (manifest["bytes_copied_in_store"] > 0) is copied
    assert "notes" not in manifest
    assert rados.output() == rados.trained.output


@pytest.mark.parametrize(
    ("code", "status"), [("NotImplemented", 501), ("AccessDenied", 403), ("InvalidRequest", 400)]
)
def test_a_store_that_refuses_is_streamed_through(moto: Scene, code: str, status: int) -> None:
    def refuse(method: str, parameters: dict[str, Any]) -> None:
        if method == "upload_part_copy":
            raise refusal(code, status)

    with moto.watched(refuse):
        manifest = moto.convert()
    (note,) = manifest["notes"]
    assert "streamed" in note
    assert code in note
    assert manifest["bytes_copied_in_store"] == 0
    assert manifest["verification"]["proven_by"] == "read back"
    assert moto.output() == moto.trained.output
    assert moto.endpoint.uploads_in(moto.bucket) == []


def test_a_store_that_knows_no_checksums_still_copies(moto: Scene) -> None:
    def refuse(method: str, parameters: dict[str, Any]) -> None:
        if "ChecksumAlgorithm" in parameters:
            raise refusal("NotImplemented", 501)

    with moto.watched(refuse):
        manifest = moto.convert()
    assert manifest["verification"]["proven_by"] == "read back"
    assert manifest["bytes_copied_in_store"] > 0
    assert moto.output() == moto.trained.output


def test_it_can_be_switched_off(moto: Scene) -> None:
    moto.options["server_side_copy"] = False
    with moto.watched() as sent:
        manifest = moto.convert()
    assert sent.count("upload_part") > 0
    assert sent.count("upload_part_copy") == 0
    assert manifest["bytes_copied_in_store"] == 0
    assert moto.output() == moto.trained.output


def _sends_part_1(request: Request) -> bool:
    return request.path.endswith("partNumber=1")


def _sends_part_2(request: Request) -> bool:
    return request.path.endswith("partNumber=2")


@pytest.mark.s3_real
@pytest.mark.parametrize("kind", ["503", "reset", "500"])
def test_copies_outlast_passing_faults(rados_s3: S3Endpoint, trained: Trained, kind: Any) -> None:
    scene = _scene(rados_s3, trained)
    with faulty_proxy(rados_s3.url) as proxy:
        scene.options = S3Endpoint(proxy.url).storage_options
        proxy.faults += [Fault(kind, _sends_part_1), Fault(kind, _sends_part_2)]
        scene.convert()
        assert not proxy.faults
    assert scene.output() == scene.trained.output
    assert scene.endpoint.uploads_in(scene.bucket) == []
    rados_s3.empty(scene.bucket)


def _damaged(scene: Scene) -> bytes:
    """One bit of a weight flipped, its CRC-32 as it was."""
    data = bytearray(scene.trained.archive)
    at = data.index(scene.trained.weights["4.weight"].numpy().tobytes()[:4096])
    data[at + 1000] ^= 1
    return bytes(data)


@pytest.mark.s3_real
@pytest.mark.parametrize("server", ["moto", "rados"])
def test_a_damaged_source_is_found_and_nothing_stays(request: pytest.FixtureRequest, server: str) -> None:
    scene: Scene = request.getfixturevalue(server)
    scene.put(_damaged(scene))
    with pytest.raises(ChecksumMismatchError):
        scene.convert()
    assert scene.names() == []
    assert scene.endpoint.uploads_in(scene.bucket) == []


@pytest.mark.s3_real
def test_a_damaged_source_does_not_replace_a_good_output(rados: Scene) -> None:
    rados.convert()
    rados.put(_damaged(rados))
    with pytest.raises(ChecksumMismatchError):
        rados.convert()
    assert rados.output() == rados.trained.output
    assert rados.names() == ["last.bin", "last.bin.manifest.json"]


def test_of_a_small_checkpoint_each_record_is_checked_as_it_passes(
    moto_s3: S3Endpoint, tmp_path: Path
) -> None:
    """Nothing worth copying: the damage is found before anything is published, and told by its tensor."""
    weights = {f"{index}.weight": random_bits(torch.float32, (256, 256), seed=index) for index in range(6)}
    torch.save({"state_dict": weights}, tmp_path / "small.pt")
    data = bytearray((tmp_path / "small.pt").read_bytes())
    bucket, options = moto_s3.make_bucket(), moto_s3.storage_options
    ends = (f"s3://{bucket}/in/small.pt", f"s3://{bucket}/out/small.bin")
    store = moto_s3.store()
    store.write_bytes(f"{bucket}/in/small.pt", bytes(data))
    ptbin.convert(*ends, source_options=options, dest_options=options)
    good = store.read_bytes(f"{bucket}/out/small.bin")
    data[data.index(weights["3.weight"].numpy().tobytes()[:1024]) + 9] ^= 1
    store.write_bytes(f"{bucket}/in/small.pt", bytes(data))
    with pytest.raises(ChecksumMismatchError, match="data/3"):
        ptbin.convert(*ends, source_options=options, dest_options=options)
    assert store.read_bytes(f"{bucket}/out/small.bin") == good


def test_foreign_bytes_between_records_do_not_go_along(moto: Scene) -> None:
    """Padding that torch does not write: the record behind it is framed anew."""
    data = bytearray(moto.trained.archive)
    at = data.index(moto.trained.weights["3.weight"].numpy().tobytes()[:4096]) - 1
    assert data[at : at + 1] == b"Z"
    data[at] = ord("!")
    moto.put(bytes(data))
    moto.convert()
    assert moto.output() == moto.trained.output


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_of_a_folder_are_copied_as_well(moto_s3: S3Endpoint, tmp_path: Path) -> None:
    """torch.distributed.checkpoint in two files: each copied part is a range of its own file."""
    weights = {f"{index}.weight": random_bits(torch.float32, (4096, 1024), seed=index) for index in range(3)}
    folder = tmp_path / "dcp"
    writer = FileSystemWriter(folder, thread_count=2)
    save_dcp({"model": weights}, storage_writer=writer, no_dist=True)
    store = moto_s3.store()
    bucket = moto_s3.make_bucket()
    for file in folder.iterdir():
        store.write_bytes(f"{bucket}/dcp/{file.name}", file.read_bytes())
    options = moto_s3.storage_options
    with asked(options) as sent:
        manifest = ptbin.convert(
            f"s3://{bucket}/dcp", f"s3://{bucket}/out/model.bin", source_options=options, dest_options=options
        )
    assert len({parameters["CopySource"]["Key"] for parameters in sent.of("upload_part_copy")}) == 2
    assert manifest["bytes_copied_in_store"] > 20 * MIB
    found = torch.load(io.BytesIO(store.read_bytes(f"{bucket}/out/model.bin")), weights_only=True)
    assert_same_tensors(found, weights)


# ------------------------------------------------------------------- a checkpoint of 330 GB, in a fake store


class _FarReader(LocalReader):
    """A local file as if it lay in an object store."""

    gap_nbytes = 256 * 1024

    def fileno(self) -> int | None:
        return None

    @property
    def server_side_store(self) -> object | None:
        return _FarStore


class _FarWriter(Writer):
    """Obeys S3's rules for parts, and keeps nothing."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.parts: list[Part] = []

    def moves_from(self, reader: RangeReader) -> bool:
        return reader.server_side_store is _FarStore

    def lay_out(self, stretches: Sequence[Extent]) -> list[Part]:
        self.parts = plan_parts(stretches, PartRules())
        return self.parts

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.bytes_written += len(data)

    def copy_from(self, reader: RangeReader, offset: int, nbytes: int) -> bool:
        part = next(part for part in self.parts if part.start == self.bytes_written)
        assert part.copied
        assert part.nbytes == nbytes
        self.bytes_written += nbytes
        self.bytes_copied += nbytes
        return True

    def _publish(self) -> None:
        self.identity = Identity("etag", "x")

    def _discard(self) -> None: ...


class _FarStore(LocalStore):
    def __init__(self) -> None:
        self.readers: list[_FarReader] = []
        self.writers: list[_FarWriter] = []

    def open_reader(self, path: str, *, expected: Identity | None = None) -> LocalReader:
        self.readers.append(_FarReader(path))
        return self.readers[-1]

    def open_writer(
        self, path: str, *, size_hint: int | None = None, copies: bool = True, claim: str = ""
    ) -> Any:
        if not path.endswith(".bin"):  # the manifest, and the claim before it
            return super().open_writer(path, size_hint=size_hint)
        self.writers.append(_FarWriter(path))
        return self.writers[-1]


def test_a_checkpoint_of_a_hundred_gigabytes_is_planned_from_its_index(tmp_path: Path) -> None:
    """Written by torch itself, its storages left as holes: 110 GB of weights, 220 GB of Adam's moments."""
    width = 4800
    shapes = {
        "qkv": (3 * width, width),
        "out": (width, width),
        "up": (4 * width, width),
        "down": (width, 4 * width),
        "norm1": (width,),
        "norm2": (width,),
    }
    state = {
        f"blocks.{block}.{name}": torch.empty(shape) for block in range(100) for name, shape in shapes.items()
    }
    moments = {
        index: {"exp_avg": torch.empty_like(tensor), "exp_avg_sq": torch.empty_like(tensor)}
        for index, tensor in enumerate(state.values())
    }
    path = tmp_path / "huge.pt"
    with torch.serialization.skip_data():
        torch.save({"state_dict": state, "optimizer": {"state": moments, "param_groups": []}}, path)
    nbytes = sum(tensor.nbytes for tensor in state.values())
    del state, moments
    assert nbytes > 100e9
    store = _FarStore()
    with registered("far", store):
        manifest = ptbin.convert(f"far://{path}", f"far://{tmp_path}/huge.bin", ConvertOptions(verify="none"))
    (writer,) = store.writers
    client = manifest["bytes_read"] + writer.bytes_written - writer.bytes_copied
    assert client <= 0.0005 * nbytes
    assert manifest["bytes_written"] - nbytes < 4 * MIB
    assert writer.bytes_copied >= nbytes - 8 * MIB
