"""Objects on S3: what requests cost, which buckets, keys and options are taken, and threads and forks."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
from botocore import UNSIGNED

from ptbin.errors import (
    AccessDeniedError,
    NotFoundInStoreError,
    StorageError,
    UsageError,
)
from ptbin.sources.opening import find_source
from ptbin.stores import open_store
from ptbin.stores.parts import PartRules
from ptbin.stores.s3 import S3Store
from ptbin.stores.s3_client import S3Client
from ptbin.stores.s3_writer import part_nbytes_for
from ptbin.version import __version__
from tests.servers.endpoint import QUICK, S3Endpoint
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.large_object import CONTENT, MIB

# ------------------------------------------------------------------------------------------------- requests


def test_costs_are_what_the_docstrings_say(proxy: FaultyProxy, store: S3Store, bucket: str) -> None:
    def requests() -> list[tuple[str, str]]:
        made = [(request.method, request.range) for request in proxy.requests]
        proxy.requests.clear()
        return made

    store.write_bytes(f"{bucket}/x", b"0123456789")
    assert requests() == [("PUT", "")]
    store.stat(f"{bucket}/x")
    assert requests() == [("HEAD", "")]
    store.read_bytes(f"{bucket}/x")
    assert requests() == [("GET", "")]
    with store.open_reader(f"{bucket}/x") as reader:
        reader.read(2, 3)
        assert requests() == [("GET", "bytes=-262144")]
    store.write_bytes(f"{bucket}/large", CONTENT)
    requests()
    with store.open_found(f"{bucket}/large", store.look(f"{bucket}/large")) as reader:
        reader.read(2, 3)
        reader.read(reader.size - 9, 9)
        reader.confirm()
        assert requests() == [("GET", "bytes=-262144"), ("GET", "bytes=2-4"), ("HEAD", "")]
    store.write_bytes(f"{bucket}/empty", b"")
    requests()
    with store.open_reader(f"{bucket}/empty") as reader:
        # No range lies in it, so some servers refuse (416).
        assert requests()[1:] in ([], [("HEAD", "")])
        assert (reader.size, reader.read(0, 0)) == (0, b"")
    list(store.iter_objects(bucket))
    assert requests() == [("GET", "")]


def test_reading_ahead_is_bounded(proxy: FaultyProxy, store: S3Store, bucket: str) -> None:
    store.write_bytes(f"{bucket}/x", CONTENT)
    with store.open_reader(f"{bucket}/x") as reader:
        pieces = reader.iter_range(0, len(CONTENT), chunk_nbytes=MIB)
        first = next(pieces)
        assert reader.requests <= reader.max_under_way
        assert b"".join([first, *pieces]) == CONTENT
        assert (reader.requests, reader.bytes_read) == (30, len(CONTENT))


def test_parts_go_out_side_by_side(proxy: FaultyProxy, store: S3Store, bucket: str) -> None:
    with store.open_writer(f"{bucket}/x", size_hint=len(CONTENT)) as writer:
        writer.write(CONTENT)
        writer.commit()
    # 30 MiB in parts of 8: begin, four parts, complete.
    assert [request.method for request in proxy.requests].count("PUT") == 4
    assert proxy.count("POST") == 2
    assert store.read_bytes(f"{bucket}/x") == CONTENT


def test_a_long_listing_comes_in_pages(proxy: FaultyProxy, store: S3Store, bucket: str) -> None:
    for number in range(7):
        store.write_bytes(f"{bucket}/p/{number}", b"x" * number)
    store.page_keys = 3
    proxy.requests.clear()
    assert [found.path for found in store.iter_objects(f"{bucket}/p")] == list("0123456")
    assert proxy.count("GET") == 3 + 1  # and whether there are folders


@pytest.mark.parametrize(
    ("size_hint", "part"),
    [
        (0, 8 * MIB),
        (80_000 * MIB, 8 * MIB),
        (80_000 * MIB + 1, 9 * MIB),
        (5 << 40, 525 * MIB),
        (None, 32 * MIB),
    ],
)
def test_parts_grow_so_that_ten_thousand_are_enough(size_hint: int | None, part: int) -> None:
    assert part_nbytes_for(size_hint) == part
    if size_hint:
        assert -(-size_hint // part) <= 10_000


def test_more_parts_than_s3_takes_is_an_error_and_aborts(
    moto_s3: S3Endpoint, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptbin.stores.s3_writer.RULES", PartRules(max_parts=2))
    with (
        pytest.raises(StorageError, match="foretold"),
        moto_s3.store().open_writer(f"{bucket}/x", size_hint=10) as writer,
    ):
        writer.write(CONTENT)
    assert moto_s3.uploads_in(bucket) == []


def test_a_check_takes_away_what_one_that_was_killed_has_left(
    moto_s3: S3Endpoint, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = moto_s3.store().client
    killed: list[str] = []

    def until_begun(method: str, uri: str, **parameters: Any) -> dict[str, Any]:
        answer = client.call(method, uri, **parameters)
        if method == "create_multipart_upload":
            killed.append(uri)
            raise KeyboardInterrupt
        return answer

    store = moto_s3.store()
    monkeypatch.setattr(store.client, "call", until_begun)
    with pytest.raises(KeyboardInterrupt):
        store.check_writable(f"{bucket}/x")
    monkeypatch.undo()
    assert killed
    assert len(moto_s3.uploads_in(bucket)) == 1
    moto_s3.store().check_writable(f"{bucket}/x")
    assert moto_s3.uploads_in(bucket) == []


MOVE = """
import json, resource, sys
from ptbin.stores import open_store

def peak_nbytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

MIB = 1 << 20
store, path = open_store(sys.argv[1], json.loads(sys.argv[2]))
peaks = []
for nbytes in (48 * MIB, 160 * MIB):
    with store.open_writer(path, size_hint=nbytes) as writer:
        for _ in range(nbytes // MIB):
            writer.write(bytes(MIB))
        writer.commit()
    with store.open_reader(path) as reader:
        for piece in reader.iter_range(0, nbytes):
            pass
    peaks.append(peak_nbytes())
sys.stdout.write(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_the_object(moto_s3: S3Endpoint, bucket: str) -> None:
    arguments = [f"s3://{bucket}/x", json.dumps(moto_s3.storage_options)]
    done = subprocess.run([sys.executable, "-c", MOVE, *arguments], capture_output=True, check=True)
    few, many = json.loads(done.stdout)
    assert many < few + 24 * MIB


# ------------------------------------------------------------------------------------ buckets, options, keys


SERVERS = ["moto_s3", pytest.param("rados_s3", marks=pytest.mark.s3_real)]


@pytest.mark.parametrize("server", SERVERS)
def test_a_missing_bucket_is_told_from_a_missing_object(server: str, request: pytest.FixtureRequest) -> None:
    endpoint: S3Endpoint = request.getfixturevalue(server)
    store = endpoint.store()
    missing = "bucket-that-is-not"
    for ask in (
        lambda: store.stat(f"{missing}/x"),
        lambda: store.read_bytes(f"{missing}/x"),
        lambda: list(store.iter_objects(f"{missing}/x")),
        lambda: store.is_directory(f"{missing}/x"),
        lambda: store.check_writable(f"{missing}/x"),
        lambda: store.write_bytes(f"{missing}/x", b"x"),
        lambda: store.write_bytes(f"{missing}/x", CONTENT),
    ):
        with pytest.raises(NotFoundInStoreError, match="no such bucket"):
            ask()
    bucket = endpoint.make_bucket()
    with pytest.raises(NotFoundInStoreError, match="no such object"):
        store.stat(f"{bucket}/x")
    with pytest.raises(NotFoundInStoreError, match="a bucket"):
        store.stat(bucket)


@pytest.mark.s3_real
def test_wrong_credentials_are_denied_and_never_told(rados_s3: S3Endpoint) -> None:
    bucket = rados_s3.make_bucket()
    for key in ("nobody", rados_s3.key):
        store = S3Endpoint(rados_s3.url, key=key, secret="hunter2").store()
        for ask in (store.stat, store.read_bytes, store.check_writable, store.is_directory):
            with pytest.raises(AccessDeniedError) as caught:
                ask(f"{bucket}/x")
            assert "hunter2" not in f"{caught.value!r}{caught.value.__cause__!r}"
    anonymous = S3Store({"anon": True, "endpoint_url": rados_s3.url}, retry=QUICK)
    with pytest.raises(AccessDeniedError):
        anonymous.check_writable(f"{bucket}/x")


def test_a_check_leaves_no_upload(moto_s3: S3Endpoint, bucket: str) -> None:
    moto_s3.store().check_writable(bucket)
    moto_s3.store().check_writable(f"{bucket}/x/y.bin")
    assert moto_s3.uploads_in(bucket) == []


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    "key", ["a//b", "../up", "./x", "?versionId=1", "x?y=1", "#x", "a b+c%20d", "ü\u2028"]
)
def test_keys_are_taken_as_they_are(server: str, key: str, request: pytest.FixtureRequest) -> None:
    endpoint: S3Endpoint = request.getfixturevalue(server)
    bucket = endpoint.make_bucket()
    store, path = open_store(f"s3://{bucket}/{key}", endpoint.storage_options)
    store.write_bytes(path, b"x")
    assert [found.path for found in store.iter_objects(bucket)] == [key]
    assert store.read_bytes(path) == b"x"


def test_markers_of_folders_are_no_objects(moto_s3: S3Endpoint, bucket: str) -> None:
    store = moto_s3.store()
    store.client.call("put_object", "x", Bucket=bucket, Key="folder/", Body=b"")
    assert list(store.iter_objects(bucket)) == []


def test_a_key_with_a_slash_at_its_end_that_holds_something_is_listed(
    moto_s3: S3Endpoint, bucket: str
) -> None:
    store = moto_s3.store()
    store.client.call("put_object", "x", Bucket=bucket, Key="run/x.pt/", Body=bytearray(b"x"))
    assert [item.path for item in store.iter_objects(bucket)] == ["run/x.pt/"]


@pytest.mark.parametrize("server", SERVERS)
def test_an_object_and_a_prefix_of_one_name_are_told_apart(
    server: str, request: pytest.FixtureRequest
) -> None:
    endpoint: S3Endpoint = request.getfixturevalue(server)
    bucket, store = endpoint.make_bucket(), endpoint.store()
    for key in ("x.pt", "x.pt-", "x.pt/inner.pt", "y.pt", "z-", "z/1"):
        store.write_bytes(f"{bucket}/{key}", key.encode())
    store.write_bytes(f"{bucket}/z", b"")  # a marker
    directories = [
        key for key in ("x.pt", "x.pt/", "y.pt", "z", "q") if store.is_directory(f"{bucket}/{key}")
    ]
    assert directories == ["x.pt/", "z"]
    assert find_source(f"s3://{bucket}/x.pt", endpoint.storage_options).open().read(0, 4) == b"x.pt"


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3:///"])
def test_a_uri_without_a_bucket_is_a_usage_error(uri: str) -> None:
    with pytest.raises(UsageError, match="names no bucket"):
        open_store(uri)


def test_options_are_handed_through_and_defaults_give_way() -> None:
    client = S3Client({"anon": True, "config_kwargs": {"read_timeout": 7}, "use_listings_cache": True})
    config = client.fs.s3.meta.config
    assert config.signature_version is UNSIGNED
    assert config.read_timeout == 7
    assert config.request_checksum_calculation == "when_required"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, f"ptbin/{__version__} "),
        ({"user_agent": "night/1"}, "night/1 "),
        ({"user_agent_extra": "x/2"}, " x/2"),
    ],
)
def test_requests_say_who_asks(moto_s3: S3Endpoint, config: dict[str, str], expected: str) -> None:
    store = moto_s3.store(config_kwargs=config)
    seen: list[str] = []
    events = store.client.fs.s3.meta.events
    events.register("before-send.s3", lambda request, **_: seen.append(str(request.headers["User-Agent"])))
    assert not store.is_directory(f"{moto_s3.make_bucket()}/x")
    assert expected in seen[-1]


def test_bad_options_are_a_usage_error_that_tells_no_values() -> None:
    store, _ = open_store("s3://bucket/x", {"config_kwargs": {"hunter2": 1}})
    with pytest.raises((UsageError, StorageError)):
        store.stat("bucket/x")
    with pytest.raises(UsageError):
        open_store("s3://bucket/x", {"config_kwargs": "hunter2"})


def test_stores_share_one_filesystem(moto_s3: S3Endpoint) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(moto_s3.store().client.fs)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(client) for client in found}) == 1
    assert moto_s3.store(anon=True).client.fs is not found[0]


HANGING = """
import socket
from functools import partial
from ptbin.stores import open_store
listener = socket.create_server(("127.0.0.1", 0))  # takes connections, never answers
url = f"http://127.0.0.1:{listener.getsockname()[1]}"
store, path = open_store("s3://bucket/x", {"key": "k", "secret": "s", "endpoint_url": url})
for _ in range(4):
    store.client.start(partial(store.client.acall, "head_object", "x", Bucket="bucket", Key="x"))
listener.accept()
"""


@pytest.mark.starts_processes
def test_requests_without_an_answer_do_not_keep_the_process_alive() -> None:
    subprocess.run([sys.executable, "-c", HANGING], check=True, timeout=30)


def test_waiting_on_the_event_loop_is_refused_and_not_done_for_ever(moto_s3: S3Endpoint, bucket: str) -> None:
    store = moto_s3.store()
    store.write_bytes(f"{bucket}/x", b"x")

    async def wait_there() -> None:
        with pytest.raises(RuntimeError, match="event loop"):
            store.read_bytes(f"{bucket}/x")

    asyncio.run_coroutine_threadsafe(wait_there(), store.client.loop).result(10)


def test_a_store_works_after_a_fork(moto_s3: S3Endpoint, bucket: str) -> None:
    store = moto_s3.store()
    store.write_bytes(f"{bucket}/x", b"from the parent")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if store.read_bytes(f"{bucket}/x") == b"from the parent" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.read_bytes(f"{bucket}/x") == b"from the parent"
