"""Passing faults of an S3 server are outlasted, others told; an upload that fails leaves nothing behind."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from ptbin.errors import (
    AccessDeniedError,
    StorageError,
)
from ptbin.stores.requests import RetryPolicy
from ptbin.stores.s3 import S3Store
from tests.servers.asked import asked, refusal
from tests.servers.endpoint import QUICK, S3Endpoint
from tests.servers.faulty_proxy import Fault, FaultyProxy, Request, faulty_proxy
from tests.servers.large_object import CONTENT, write_large


@pytest.mark.parametrize("kind", ["503", "500", "reset", "short"])
def test_a_read_outlasts_passing_faults(proxy: FaultyProxy, store: S3Store, bucket: str, kind: Any) -> None:
    store.write_bytes(f"{bucket}/x", CONTENT)
    gets = lambda request: request.method == "GET"  # noqa: E731
    with store.open_reader(f"{bucket}/x") as reader:
        proxy.faults += [Fault(kind, gets)] * 3
        proxy.requests.clear()
        assert reader.read(5, 1000) == CONTENT[5:1005]
        # aiohttp asks again by itself, once, where a connection was closed.
        assert reader.requests == (2 if kind == "reset" else 4)
    assert proxy.count("GET") == 4
    assert not proxy.faults


@pytest.mark.parametrize("kind", ["503", "reset", "short"])
def test_attempts_at_reading_are_bounded(proxy: FaultyProxy, store: S3Store, bucket: str, kind: Any) -> None:
    store.write_bytes(f"{bucket}/x", CONTENT)
    with store.open_reader(f"{bucket}/x") as reader:
        proxy.faults += [Fault(kind, lambda request: request.method == "GET")] * 20
        proxy.requests.clear()
        with pytest.raises(StorageError, match=f"s3://{bucket}/x") as caught:
            reader.read(0, 1000)
    assert caught.value.transient
    assert proxy.count("GET") == QUICK.attempts * (2 if kind == "reset" else 1)


def test_a_permanent_fault_is_not_repeated(proxy: FaultyProxy, store: S3Store, bucket: str) -> None:
    store.write_bytes(f"{bucket}/x", b"x")
    proxy.faults += [Fault("403", lambda request: request.method == "GET")] * 2
    with pytest.raises(AccessDeniedError, match="AccessDenied"):
        store.read_bytes(f"{bucket}/x")
    assert proxy.count("GET") == 1


@pytest.mark.parametrize("kind", ["503", "500", "reset", "lost-answer"])
def test_an_upload_outlasts_passing_faults(
    proxy: FaultyProxy, store: S3Store, moto_s3: S3Endpoint, bucket: str, kind: Any
) -> None:
    proxy.faults += [
        Fault(kind, lambda request: "partNumber=2" in request.path),
        Fault(kind, lambda request: "partNumber=4" in request.path),
        # A completion whose answer is lost has happened: the repetition finds no upload any more.
        Fault(kind, lambda request: request.method == "POST" and "uploadId" in request.path),
    ]
    with store.open_writer(f"{bucket}/x", size_hint=len(CONTENT)) as writer:
        writer.write(CONTENT)
        writer.commit()
    assert not proxy.faults
    assert store.read_bytes(f"{bucket}/x") == CONTENT
    assert moto_s3.uploads_in(bucket) == []


@pytest.mark.s3_real
def test_a_completion_whose_answer_was_lost_is_found_done(rados_s3: S3Endpoint) -> None:
    bucket = rados_s3.make_bucket()
    with faulty_proxy(rados_s3.url) as proxy:
        store = S3Endpoint(proxy.url).store()
        completes = lambda request: request.method == "POST" and "uploadId" in request.path  # noqa: E731
        proxy.faults.append(Fault("lost-answer", completes))
        write_large(store, bucket)
        assert proxy.count("POST", "uploadId") == 2
        assert store.read_bytes(f"{bucket}/x") == CONTENT


@pytest.mark.parametrize("completed", [True, False])
def test_a_missing_upload_is_a_success_only_where_the_object_is_there(
    moto_s3: S3Endpoint, bucket: str, completed: bool
) -> None:
    # What S3 answers to a repeated completion; both servers of the suite accept it a second time.
    store = moto_s3.store()

    def forget(method: str, parameters: dict[str, Any]) -> None:
        if method == "complete_multipart_upload":
            if completed:
                moto_s3.store(anon=False).client.call(method, bucket, **parameters)
            raise refusal("NoSuchUpload", 404)

    if completed:
        with asked(moto_s3.storage_options, forget):
            write_large(store, bucket)
        assert store.read_bytes(f"{bucket}/x") == CONTENT
    else:
        store.write_bytes(f"{bucket}/x", b"an older one")
        with asked(moto_s3.storage_options, forget), pytest.raises(StorageError, match="NoSuchUpload"):
            write_large(store, bucket)
        assert store.read_bytes(f"{bucket}/x") == b"an older one"
        assert moto_s3.uploads_in(bucket) == []


def test_an_upload_whose_beginning_was_not_heard_of_is_discarded_later(
    proxy: FaultyProxy, store: S3Store, moto_s3: S3Endpoint, bucket: str
) -> None:
    begins = lambda request: request.method == "POST" and "uploads" in request.path  # noqa: E731
    proxy.faults += [Fault("lost-answer", begins)] * 2
    write_large(store, bucket)
    assert store.read_bytes(f"{bucket}/x") == CONTENT
    assert moto_s3.uploads_in(bucket) == ["x", "x"]  # which of them is ours, no answer says
    assert store.discard_unfinished(bucket, lambda path: path == "x") == 2
    assert moto_s3.uploads_in(bucket) == []


def test_a_small_object_outlasts_them_too(proxy: FaultyProxy, store: S3Store, bucket: str) -> None:
    proxy.faults += [Fault("503"), Fault("reset"), Fault("500")]
    store.write_bytes(f"{bucket}/x", b"weights")
    assert store.read_bytes(f"{bucket}/x") == b"weights"


def failing(request: Request) -> bool:
    return "partNumber=3" in request.path


@pytest.mark.parametrize("fault", [Fault("403", failing), Fault("503", failing)], ids=["403", "503"])
def test_a_failed_upload_is_aborted(
    proxy: FaultyProxy, store: S3Store, moto_s3: S3Endpoint, bucket: str, fault: Fault
) -> None:
    proxy.faults += [fault] * 9
    with pytest.raises(StorageError, match=f"cannot write s3://{bucket}/x"):
        write_large(store, bucket)
    assert moto_s3.uploads_in(bucket) == []
    assert list(store.iter_objects(bucket)) == []


def test_a_failing_abort_does_not_hide_the_first_error(
    proxy: FaultyProxy, store: S3Store, bucket: str
) -> None:
    proxy.faults += [Fault("403", failing)]
    proxy.faults += [Fault("500", lambda request: request.method == "DELETE")] * 9
    with pytest.raises(AccessDeniedError, match="cannot write"):
        write_large(store, bucket)
    assert proxy.count("DELETE") == QUICK.attempts


def test_an_upload_under_way_is_given_up_with_the_writer(
    store: S3Store, moto_s3: S3Endpoint, bucket: str
) -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),
        store.open_writer(f"{bucket}/x", size_hint=1 << 30) as writer,
    ):
        writer.write(CONTENT)
        assert moto_s3.uploads_in(bucket) == ["x"]
        raise KeyboardInterrupt
    assert moto_s3.uploads_in(bucket) == []


def test_an_unreachable_store_is_a_transient_error() -> None:
    policy = RetryPolicy(attempts=2, first_delay_s=0.01)
    store = S3Endpoint("http://127.0.0.1:9").store(retry=policy)  # the discard port: nobody listens
    with pytest.raises(StorageError, match="does not answer") as caught:
        store.stat("bucket/x")
    assert caught.value.transient
