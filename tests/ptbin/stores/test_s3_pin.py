"""All that is read of an object is of one state of it, whatever becomes of it meanwhile."""

from __future__ import annotations

import pytest

from ptbin.errors import (
    SourceChangedError,
    StorageError,
)
from ptbin.stores.s3 import S3Store
from tests.servers.asked import Bend, asked
from tests.servers.endpoint import S3Endpoint
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.large_object import CONTENT, MIB


@pytest.mark.parametrize("versioned", [False, True])
def test_every_range_belongs_to_the_object_seen_first(moto_s3: S3Endpoint, versioned: bool) -> None:
    check_pin(moto_s3, versioned=versioned)


@pytest.mark.s3_real
@pytest.mark.parametrize("versioned", [False, True])
def test_every_range_belongs_to_the_object_seen_first_on_a_real_server(
    rados_s3: S3Endpoint, versioned: bool
) -> None:
    check_pin(rados_s3, versioned=versioned)


def check_pin(endpoint: S3Endpoint, *, versioned: bool) -> None:
    """Unversioned: refused. Versioned: the old version is read on, and the change is told at the end."""
    bucket = endpoint.make_bucket(versioned=versioned)
    store = endpoint.store()
    store.write_bytes(f"{bucket}/x", b"old" * 6 * MIB)
    with store.open_reader(f"{bucket}/x") as reader:
        assert ("VersionId" in reader.copy_source["CopySource"]) is versioned
        pieces = reader.iter_range(0, reader.size, chunk_nbytes=MIB // 4)
        got = [next(pieces)]
        store.write_bytes(f"{bucket}/x", b"new" * 6 * MIB)
        if versioned:
            assert b"".join([*got, *pieces]) == b"old" * 6 * MIB
            assert reader.read(0, 3) == b"old"
        else:
            with pytest.raises(SourceChangedError, match=f"s3://{bucket}/x"):
                got += list(pieces)
            assert b"new" not in b"".join(got)
            with pytest.raises(SourceChangedError):
                reader.read(0, 3)
        with pytest.raises(SourceChangedError):
            reader.check_unchanged()


def test_every_range_is_asked_for_on_condition(proxy: FaultyProxy, store: S3Store, bucket: str) -> None:
    store.write_bytes(f"{bucket}/x", CONTENT)
    with store.open_reader(f"{bucket}/x") as reader:
        proxy.requests.clear()
        reader.read(0, 5)
        list(reader.iter_range(0, len(CONTENT)))
        list(reader.iter_ranges([(0, 5), (20 * MIB, 7)]))
        etag = reader.identity.value
    assert len(proxy.requests) == 7
    assert {request.if_match for request in proxy.requests} == {f'"{etag}"'}


def test_an_object_that_shrank_is_another_one(moto_s3: S3Endpoint, bucket: str) -> None:
    store = moto_s3.store()
    store.write_bytes(f"{bucket}/x", CONTENT)
    with store.open_reader(f"{bucket}/x") as reader:
        store.write_bytes(f"{bucket}/x", b"0")
        with pytest.raises(SourceChangedError):
            reader.read(5, 5)


def test_a_deleted_object_is_another_one(moto_s3: S3Endpoint, bucket: str) -> None:
    store = moto_s3.store()
    store.write_bytes(f"{bucket}/x", CONTENT)
    with store.open_reader(f"{bucket}/x") as reader:
        store.delete(f"{bucket}/x")
        with pytest.raises(SourceChangedError, match="deleted"):
            reader.read(5, 5)


def test_a_small_object_is_read_in_one_state_whatever_becomes_of_it(moto_s3: S3Endpoint, bucket: str) -> None:
    store = moto_s3.store()
    store.write_bytes(f"{bucket}/x", b"0123456789")
    with store.open_reader(f"{bucket}/x") as reader:
        store.write_bytes(f"{bucket}/x", b"another one")
        assert reader.read(5, 5) == b"56789"
        reader.confirm()
        with pytest.raises(SourceChangedError):
            reader.check_unchanged()


def _without(parameter: str) -> Bend:
    """As a server that pays no heed to it."""
    return lambda method, parameters: parameters.pop(parameter, None)


def test_a_server_that_ignores_conditions_is_found_out(moto_s3: S3Endpoint, bucket: str) -> None:
    store = moto_s3.store()
    store.write_bytes(f"{bucket}/x", b"old" * MIB)
    with store.open_reader(f"{bucket}/x") as reader:
        store.write_bytes(f"{bucket}/x", b"new" * MIB)
        with (
            asked(moto_s3.storage_options, _without("IfMatch")),
            pytest.raises(SourceChangedError, match="not the object seen first"),
        ):
            reader.read(0, 3)


def test_a_server_that_ignores_ranges_is_found_out(moto_s3: S3Endpoint, bucket: str) -> None:
    store = moto_s3.store()
    store.write_bytes(f"{bucket}/x", CONTENT)
    with (
        asked(moto_s3.storage_options, _without("Range")),
        store.open_reader(f"{bucket}/x") as reader,
        pytest.raises(StorageError, match="ignores ranges"),
    ):
        reader.read(2, 3)
