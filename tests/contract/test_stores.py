"""The contract, kept by each backend."""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING, Any

import fsspec
import pytest

from ptbin.stores import open_store
from ptbin.stores.fsspec_store import FsspecStore
from ptbin.stores.requests import RetryPolicy
from tests.contract.store_contract import Place, ReadingContract, StoreContract
from tests.fakes import CountingStore
from tests.servers.endpoint import S3Endpoint
from tests.servers.random_faults import Faults, random_faults

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ptbin.stores.s3 import S3Store


class TestLocal(StoreContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(*open_store(str(tmp_path)))


class TestNamedTemporaryFile(StoreContract):
    """A filesystem without unnamed files: NFS, many FUSE mounts."""

    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
        monkeypatch.delattr(os, "O_TMPFILE")
        return Place(*open_store(str(tmp_path)))


class TestMemory(StoreContract):
    @pytest.fixture
    def place(self) -> Place:
        return Place(*open_store(f"memory://{os.urandom(6).hex()}"), pins_every_read=False)


class TestCached(StoreContract):
    """A chained URL: a filesystem before another one."""

    @pytest.fixture
    def place(self) -> Place:
        return Place(*open_store(f"simplecache::memory://{os.urandom(6).hex()}/x"), pins_every_read=False)


class ArchivedStore(FsspecStore):
    """The members of a zip archive, which only tests write."""

    def write_bytes(self, path: str, data: bytes, *, claim: str = "", lasting: bool = True) -> None:
        del claim, lasting
        with zipfile.ZipFile(self.fs.fo.name, "a") as archive:
            archive.writestr(path, data)
        fsspec.AbstractFileSystem.clear_instance_cache()
        type(self.fs).clear_instance_cache()
        self._connected = None


class TestZip(ReadingContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        archive = tmp_path / "x.zip"
        zipfile.ZipFile(archive, "w").close()
        uri = f"zip://prefix::{archive}"
        return Place(ArchivedStore(uri, "prefix", {}), "prefix", pins_every_read=False)


class TestWrapped(StoreContract):
    """The fakes must not bend what they wrap."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        store, root = open_store(str(tmp_path))
        return Place(CountingStore(store), root)


class TestMoto(StoreContract):
    @pytest.fixture
    def place(self, moto_s3: S3Endpoint) -> Place:
        return Place(moto_s3.store(), f"{moto_s3.make_bucket()}/some/prefix", has_folders=False)


class TestMotoVersioned(StoreContract):
    @pytest.fixture
    def place(self, moto_s3: S3Endpoint) -> Place:
        return Place(moto_s3.store(), f"{moto_s3.make_bucket(versioned=True)}/prefix", has_folders=False)


class TestS3ThroughFsspec(StoreContract):
    """The generic store over an asynchronous filesystem: its windows, its conditional nothing."""

    @pytest.fixture
    def place(self, moto_s3: S3Endpoint) -> Place:
        from ptbin.stores.fsspec_store import open_fsspec

        store, root = open_fsspec(f"s3://{moto_s3.make_bucket()}/prefix", moto_s3.storage_options)
        return Place(store, root, pins_every_read=False, has_folders=False)


@pytest.fixture(scope="module")
def unreliable(moto_s3: S3Endpoint) -> Iterator[S3Store]:
    patient = RetryPolicy(attempts=12, first_delay_s=0.001, max_delay_s=0.002)
    with random_faults(moto_s3.url, Faults(7, p503=0.1, cut=0.05)) as proxy:
        yield S3Endpoint(proxy.url).store(retry=patient)


class TestMotoWithFaults(StoreContract):
    """Behind a proxy that refuses every tenth request, and cuts every twentieth off."""

    @pytest.fixture
    def place(self, moto_s3: S3Endpoint, unreliable: S3Store) -> Place:
        return Place(unreliable, f"{moto_s3.make_bucket()}/prefix", has_folders=False, repeats=True)


@pytest.mark.s3_real
class TestRadosGateway(StoreContract):
    @pytest.fixture
    def place(self, rados_s3: S3Endpoint) -> Place:
        return Place(rados_s3.store(), f"{rados_s3.make_bucket()}/some/prefix", has_folders=False)


@pytest.mark.s3_real
class TestRadosGatewayVersioned(StoreContract):
    @pytest.fixture
    def place(self, rados_s3: S3Endpoint) -> Place:
        return Place(rados_s3.store(), f"{rados_s3.make_bucket(versioned=True)}/prefix", has_folders=False)


# aiohttp's advice to gcsfs and adlfs, which the suite would else take for a failure.
RAW_BYTES = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")


@pytest.mark.other_stores
@RAW_BYTES
class TestGoogle(StoreContract):
    @pytest.fixture
    def place(self, google_storage: dict[str, Any]) -> Place:
        store, bucket = open_store(f"gs://bucket-{os.urandom(6).hex()}", google_storage)
        assert isinstance(store, FsspecStore)
        store.fs.mkdir(bucket)
        return Place(store, f"{bucket}/prefix", pins_every_read=False, has_folders=False)


@pytest.mark.other_stores
@RAW_BYTES
class TestAzure(StoreContract):
    @pytest.fixture
    def place(self, azure_storage: dict[str, Any]) -> Place:
        store, container = open_store(f"az://container-{os.urandom(6).hex()}", azure_storage)
        assert isinstance(store, FsspecStore)
        store.fs.mkdir(container)
        return Place(store, f"{container}/prefix", pins_every_read=False, has_folders=False)


@pytest.mark.other_stores
class TestSftp(StoreContract):
    @pytest.fixture
    def place(self, sftp_server: dict[str, Any], tmp_path: Path) -> Place:
        place = open_store(f"sftp://127.0.0.1{tmp_path}", sftp_server)
        # The protocol tells times in whole seconds.
        return Place(*place, pins_every_read=False, tick_s=1.1)
