from __future__ import annotations

import errno
import pickle
from unittest.mock import Mock

import aiohttp
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
)

from ptbin.errors import (
    AccessDeniedError,
    CorruptArchiveError,
    NoSpaceError,
    NotFoundInStoreError,
    PtbinError,
    SourceChangedError,
    StorageError,
)
from ptbin.stores import place_of
from ptbin.stores.faults import fault, mapped_faults, public_uri


def answer(code: str, status: int, message: str = "what the store said") -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}},
        "GetObject",
    )


@pytest.mark.parametrize(
    ("error", "kind", "transient"),
    [
        (answer("NoSuchKey", 404), NotFoundInStoreError, False),
        (answer("NoSuchBucket", 404), NotFoundInStoreError, False),
        (answer("404", 404, "Not Found"), NotFoundInStoreError, False),
        (answer("AccessDenied", 403), AccessDeniedError, False),
        (answer("403", 403, "Forbidden"), AccessDeniedError, False),
        (answer("InvalidAccessKeyId", 403), AccessDeniedError, False),
        (answer("ExpiredToken", 400), AccessDeniedError, False),
        (answer("SignatureDoesNotMatch", 403), AccessDeniedError, False),
        (answer("PreconditionFailed", 412), SourceChangedError, None),
        (answer("SlowDown", 503), StorageError, True),
        (answer("InternalError", 500), StorageError, True),
        (answer("InternalError", 200), StorageError, True),
        (answer("", 502), StorageError, True),
        (answer("504", 504), StorageError, True),
        (answer("RequestTimeout", 400), StorageError, True),
        (answer("EntityTooLarge", 400), StorageError, False),
        (answer("NoSuchUpload", 404), StorageError, False),
        (answer("NotImplemented", 501), StorageError, False),
        (EndpointConnectionError(endpoint_url="http://x"), StorageError, True),
        (ConnectTimeoutError(endpoint_url="http://x"), StorageError, True),
        (ReadTimeoutError(endpoint_url="http://x"), StorageError, True),
        (NoCredentialsError(), AccessDeniedError, False),
        (TimeoutError(), StorageError, True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), StorageError, True),
        (BrokenPipeError(errno.EPIPE, "pipe"), StorageError, True),
        (FileNotFoundError(errno.ENOENT, "gone"), NotFoundInStoreError, False),
        (FileNotFoundError("without a number"), NotFoundInStoreError, False),
        (NotADirectoryError(errno.ENOTDIR, "x"), NotFoundInStoreError, False),
        (PermissionError(errno.EACCES, "x"), AccessDeniedError, False),
        (OSError(errno.EROFS, "x"), AccessDeniedError, False),
        (OSError(errno.ENOSPC, "x"), NoSpaceError, False),
        (OSError(errno.EDQUOT, "x"), NoSpaceError, False),
        (OSError(errno.EIO, "x"), StorageError, False),
        (OSError(errno.ENAMETOOLONG, "x"), StorageError, False),
        (NotImplementedError(), StorageError, False),
        (ValueError("embedded null byte"), StorageError, False),
    ],
    ids=repr,
)
def test_each_foreign_error_has_its_place(
    error: Exception, kind: type[PtbinError], transient: bool | None
) -> None:
    mapped = fault(error, "read", "s3://bucket/key")
    assert type(mapped) is kind
    assert getattr(mapped, "transient", None) is transient
    assert str(mapped).startswith("cannot read s3://bucket/key: ")
    assert "\n" not in str(mapped)
    assert str(pickle.loads(pickle.dumps(mapped))) == str(mapped)  # back from a worker process


def test_http_clients_are_known_by_their_status() -> None:
    class HttpError(Exception):
        def __init__(self, code: int) -> None:
            super().__init__(f"status {code}")
            self.code = code

    assert type(fault(HttpError(404), "read", "gs://b/k")) is NotFoundInStoreError
    assert type(fault(HttpError(401), "read", "gs://b/k")) is AccessDeniedError
    throttled = fault(HttpError(429), "read", "gs://b/k")
    assert isinstance(throttled, StorageError)
    assert throttled.transient


def test_a_server_that_is_away_or_refuses_is_not_a_missing_file() -> None:
    for cause, kind in (
        (aiohttp.ServerDisconnectedError(), StorageError),
        (aiohttp.ClientResponseError(Mock(), (), status=403), AccessDeniedError),
        (aiohttp.ClientResponseError(Mock(), (), status=404), NotFoundInStoreError),
    ):
        error = FileNotFoundError("http://host/a.pt")  # as fsspec's HTTP store has it
        error.__cause__ = cause
        assert type(fault(error, "read", "http://host/a.pt")) is kind
    with pytest.raises(StorageError, match="is only read"):
        place_of("http://127.0.0.1:9/a.bin").check_writable()


def test_a_message_says_what_to_do_next() -> None:
    assert "free some space" in str(fault(OSError(errno.ENOSPC, "x"), "write", "/out/x.bin"))
    assert "credentials" in str(fault(NoCredentialsError(), "read", "s3://b/k"))


def test_messages_are_bounded_and_single_lines() -> None:
    text = str(fault(RuntimeError("line\n" * 10_000), "read", "x"))
    assert len(text) < 500
    assert "\n" not in text


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("sftp://ann:s3cret@host/x", "sftp://ann@host/x"),
        ("s3://bucket/a@b:c", "s3://bucket/a@b:c"),
        ("https://h/x?X-Amz-Signature=s3cret&y=1", "https://h/x?X-Amz-Signature=***&y=1"),
        ("https://h/x?sig=s3cret&sv=2", "https://h/x?sig=***&sv=***"),
        ("https://h/x?access_token=s3cret", "https://h/x?access_token=***"),
        ("/data/x?y=1", "/data/x?y=1"),
    ],
)
def test_uris_lose_their_secrets(uri: str, public: str) -> None:
    assert public_uri(uri) == public


def test_foreign_messages_lose_secrets_too() -> None:
    error = RuntimeError("GET https://ann:s3cret@host/x?X-Amz-Credential=s3cret failed")
    assert "s3cret" not in str(fault(error, "read", "https://bob:s3cret@host/x"))


def test_our_own_errors_pass_untouched() -> None:
    with pytest.raises(CorruptArchiveError, match=r"^as it was$"), mapped_faults("read", "x"):
        raise CorruptArchiveError("as it was")
    with pytest.raises(KeyboardInterrupt), mapped_faults("read", "x"):
        raise KeyboardInterrupt
