"""Outputs that an object store puts together by itself: what is copied, what proves it, what goes wrong."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from botocore.exceptions import ClientError
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

import ptbin
from ptbin.errors import ChecksumMismatchError, SourceChangedError
from ptbin.options import ConvertOptions
from ptbin.stores import Identity, RangeReader, Writer
from ptbin.stores.local import LocalReader, LocalStore
from ptbin.stores.parts import Extent, Part, PartRules, plan_parts
from ptbin.stores.s3_client import S3Client
from tests.bits import assert_same_tensors
from tests.checkpoints.dtypes import random_bits
from tests.fakes import registered
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


@dataclass
class Scene:
    """A checkpoint in a bucket, the output it must become, and everything that was sent to the store."""

    endpoint: S3Endpoint
    bucket: str
    local: Path
    expected: bytes
    weights: dict[str, torch.Tensor]
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

    def output(self) -> bytes:
        return self.endpoint.store().read_bytes(f"{self.bucket}/out/last.bin")

    def names(self) -> list[str]:
        return [item.path for item in self.endpoint.store().iter_objects(f"{self.bucket}/out")]


def _scene(endpoint: S3Endpoint, tmp_path: Path, **bucket_options: Any) -> Scene:
    weights = _weights()
    local = tmp_path / "last.ckpt"
    _adam(local, weights)
    ptbin.convert(str(local), str(tmp_path / "last.bin"))
    bucket = endpoint.make_bucket(**bucket_options)
    # A client of its own for each scene: tests look at, or bend, what it sends.
    options = endpoint.storage_options | {"config_kwargs": {"user_agent_extra": bucket}}
    scene = Scene(endpoint, bucket, local, (tmp_path / "last.bin").read_bytes(), weights, options)
    scene.put(local.read_bytes())
    return scene


@pytest.fixture
def moto(moto_s3: S3Endpoint, tmp_path: Path) -> Scene:
    """A store that keeps a CRC-32 of whole objects."""
    return _scene(moto_s3, tmp_path)


@pytest.fixture
def rados(rados_s3: S3Endpoint, tmp_path: Path) -> Iterator[Scene]:
    """A store that does not, and that ignores `CopySourceIfMatch`."""
    scene = _scene(rados_s3, tmp_path)
    yield scene
    rados_s3.empty(scene.bucket)


@dataclass
class Sent:
    """Requests as botocore is asked for them; `bend` may raise, or act, before one goes out."""

    requests: list[tuple[str, dict[str, Any]]]
    bend: Callable[[str, dict[str, Any]], None]

    def count(self, method: str) -> int:
        return sum(name == method for name, _ in self.requests)

    def of(self, method: str) -> list[dict[str, Any]]:
        return [parameters for name, parameters in self.requests if name == method]

    @property
    def client_nbytes(self) -> int:
        """Weights and framing that came to this process or left it; listings and manifests aside."""
        total = 0
        for method, parameters in self.requests:
            if method == "get_object" and "Range" in parameters:
                first, last = parameters["Range"].removeprefix("bytes=").split("-")
                # Without a first byte, so many at the end.
                total += int(last) - int(first) + 1 if first else int(last)
            elif method == "upload_part":
                total += parameters.get("ContentLength") or len(parameters["Body"])
        return total


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    seen = Sent([], lambda method, parameters: None)
    send = S3Client.send

    async def noted(self: S3Client, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        seen.requests.append((method, dict(parameters)))
        # What it does to the store waits for the loop that this runs on.
        await asyncio.to_thread(seen.bend, method, parameters)
        return await send(self, method, parameters)

    monkeypatch.setattr(S3Client, "send", noted)
    return seen


def test_the_store_copies_and_its_checksum_proves(moto: Scene, sent: Sent) -> None:
    manifest = moto.convert()
    assert manifest["verification"]["proven_by"] == "store checksum"
    assert manifest["bytes_copied_in_store"] > WEIGHTS_NBYTES - 6 * MIB
    # 5 MiB are the least that the first part may hold; all else is index.
    assert sent.client_nbytes < 2 * 5 * MIB + MIB
    assert sent.count("upload_part_copy") >= 1
    assert moto.output() == moto.expected
    assert moto.endpoint.uploads_in(moto.bucket) == []
    assert "notes" not in manifest
    again = ptbin.verify(f"{moto.dest}.manifest.json", level="load", storage_options=moto.options)
    assert again == []


@pytest.mark.s3_real
def test_without_a_checksum_of_the_store_the_output_is_read_back(rados: Scene, sent: Sent) -> None:
    manifest = rados.convert()
    assert manifest["verification"]["proven_by"] == "read back"
    assert manifest["bytes_copied_in_store"] > 0.7 * WEIGHTS_NBYTES
    assert rados.output() == rados.expected
    assert rados.endpoint.uploads_in(rados.bucket) == []


@pytest.mark.s3_real
def test_without_proof_hardly_a_byte_passes_through(rados: Scene, sent: Sent) -> None:
    manifest = rados.convert("none")
    assert sent.client_nbytes < 2 * 5 * MIB + MIB
    assert manifest["bytes_read"] < 6 * MIB
    assert manifest["verification"] == manifest["verification"] | {"level": "none", "status": "not verified"}
    assert rados.output() == rados.expected


@pytest.mark.parametrize("versioned", [False, True])
def test_each_copy_is_pinned(moto_s3: S3Endpoint, tmp_path: Path, sent: Sent, versioned: bool) -> None:
    scene = _scene(moto_s3, tmp_path, versioned=versioned)
    scene.convert()
    copies = sent.of("upload_part_copy")
    assert copies
    for parameters in copies:
        assert parameters["CopySourceIfMatch"].startswith('"')
        assert ("VersionId" in parameters["CopySource"]) is versioned


@pytest.mark.s3_real
def test_a_source_that_changes_meanwhile_is_noticed(rados: Scene, sent: Sent) -> None:
    def overwrite(method: str, parameters: dict[str, Any]) -> None:
        if method == "upload_part_copy":
            sent.bend = lambda method, parameters: None
            rados.put(b"\0" * rados.local.stat().st_size)

    sent.bend = overwrite
    with pytest.raises(SourceChangedError):
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
    rados.endpoint.store().write_bytes(f"{rados.bucket}/{key}", rados.local.read_bytes())
    manifest = ptbin.convert(
        f"s3://{rados.bucket}/{key}",
        rados.dest,
        ConvertOptions(verify="none"),
        source_options=rados.options,
        dest_options=rados.options,
    )
    assert (manifest["bytes_copied_in_store"] > 0) is copied
    assert "notes" not in manifest
    assert rados.output() == rados.expected


def _refused(code: str, status: int) -> ClientError:
    answer: Any = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "UploadPartCopy")


@pytest.mark.parametrize(
    ("code", "status"), [("NotImplemented", 501), ("AccessDenied", 403), ("InvalidRequest", 400)]
)
def test_a_store_that_refuses_is_streamed_through(moto: Scene, sent: Sent, code: str, status: int) -> None:
    def refuse(method: str, parameters: dict[str, Any]) -> None:
        if method == "upload_part_copy":
            raise _refused(code, status)

    sent.bend = refuse
    manifest = moto.convert()
    (note,) = manifest["notes"]
    assert "streamed" in note
    assert code in note
    assert manifest["bytes_copied_in_store"] == 0
    assert manifest["verification"]["proven_by"] == "read back"
    assert moto.output() == moto.expected
    assert moto.endpoint.uploads_in(moto.bucket) == []


def test_a_store_that_knows_no_checksums_still_copies(moto: Scene, sent: Sent) -> None:
    def refuse(method: str, parameters: dict[str, Any]) -> None:
        if "ChecksumAlgorithm" in parameters:
            raise _refused("NotImplemented", 501)

    sent.bend = refuse
    manifest = moto.convert()
    assert manifest["verification"]["proven_by"] == "read back"
    assert manifest["bytes_copied_in_store"] > 0
    assert moto.output() == moto.expected


def test_it_can_be_switched_off(moto: Scene, sent: Sent) -> None:
    moto.options["server_side_copy"] = False
    manifest = moto.convert()
    assert sent.count("upload_part_copy") == 0
    assert manifest["bytes_copied_in_store"] == 0
    assert moto.output() == moto.expected


def _sends_part_1(request: Request) -> bool:
    return request.path.endswith("partNumber=1")


def _sends_part_2(request: Request) -> bool:
    return request.path.endswith("partNumber=2")


@pytest.mark.s3_real
@pytest.mark.parametrize("kind", ["503", "reset", "500"])
def test_copies_outlast_passing_faults(rados_s3: S3Endpoint, tmp_path: Path, kind: Any) -> None:
    scene = _scene(rados_s3, tmp_path)
    with faulty_proxy(rados_s3.url) as proxy:
        scene.options = S3Endpoint(proxy.url).storage_options
        proxy.faults += [Fault(kind, _sends_part_1), Fault(kind, _sends_part_2)]
        scene.convert()
        assert not proxy.faults
    assert scene.output() == scene.expected
    assert scene.endpoint.uploads_in(scene.bucket) == []
    rados_s3.empty(scene.bucket)


def _damaged(scene: Scene) -> bytes:
    """One bit of a weight flipped, its CRC-32 as it was."""
    data = bytearray(scene.local.read_bytes())
    at = data.index(scene.weights["4.weight"].numpy().tobytes()[:4096])
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
    assert rados.output() == rados.expected
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
    data = bytearray(moto.local.read_bytes())
    at = data.index(moto.weights["3.weight"].numpy().tobytes()[:4096]) - 1
    assert data[at : at + 1] == b"Z"
    data[at] = ord("!")
    moto.put(bytes(data))
    moto.convert()
    assert moto.output() == moto.expected


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_of_a_folder_are_copied_as_well(moto_s3: S3Endpoint, tmp_path: Path, sent: Sent) -> None:
    """torch.distributed.checkpoint in two files: each copied part is a range of its own file."""
    weights = {f"{index}.weight": random_bits(torch.float32, (4096, 1024), seed=index) for index in range(3)}
    folder = tmp_path / "dcp"
    writer = FileSystemWriter(folder, thread_count=2)
    save_dcp({"model": weights}, storage_writer=writer, no_dist=True)
    store = moto_s3.store()
    bucket = moto_s3.make_bucket()
    for file in folder.iterdir():
        store.write_bytes(f"{bucket}/dcp/{file.name}", file.read_bytes())
    manifest = ptbin.convert(
        f"s3://{bucket}/dcp",
        f"s3://{bucket}/out/model.bin",
        source_options=moto_s3.storage_options,
        dest_options=moto_s3.storage_options,
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
