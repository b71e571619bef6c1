"""The contract, kept by each backend."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ptbin.stores import open_store
from tests.contract.store_contract import Place, StoreContract
from tests.fakes import CountingStore

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers.endpoint import S3Endpoint


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


class TestWrapped(StoreContract):
    """The fakes must not bend what they wrap."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        store, root = open_store(str(tmp_path))
        return Place(CountingStore(store), root)


class TestMoto(StoreContract):
    @pytest.fixture
    def place(self, moto_s3: S3Endpoint) -> Place:
        return Place(moto_s3.store(), f"{moto_s3.make_bucket()}/some/prefix")


class TestMotoVersioned(StoreContract):
    @pytest.fixture
    def place(self, moto_s3: S3Endpoint) -> Place:
        return Place(moto_s3.store(), f"{moto_s3.make_bucket(versioned=True)}/prefix")


class TestS3ThroughFsspec(StoreContract):
    """The generic store over an asynchronous filesystem: its windows, its conditional nothing."""

    @pytest.fixture
    def place(self, moto_s3: S3Endpoint) -> Place:
        from ptbin.stores.fsspec_store import open_fsspec

        store, root = open_fsspec(f"s3://{moto_s3.make_bucket()}/prefix", moto_s3.storage_options)
        return Place(store, root, pins_every_read=False)


@pytest.mark.s3_real
class TestRadosGateway(StoreContract):
    @pytest.fixture
    def place(self, rados_s3: S3Endpoint) -> Place:
        return Place(rados_s3.store(), f"{rados_s3.make_bucket()}/some/prefix")


@pytest.mark.s3_real
class TestRadosGatewayVersioned(StoreContract):
    @pytest.fixture
    def place(self, rados_s3: S3Endpoint) -> Place:
        return Place(rados_s3.store(), f"{rados_s3.make_bucket(versioned=True)}/prefix")
