"""Storage options mean what they mean to s3fs: its own client is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
import s3fs

from ptbin.errors import StorageError, UsageError
from ptbin.stores.s3_client import S3Client, S3Object
from ptbin.stores.s3_options import read_options

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "keys": {"key": "k", "secret": "s"},
    "names of old": {"username": "k", "password": "s"},
    "token": {"key": "k", "secret": "s", "token": "t"},
    "anonymous": {"anon": True, "key": "k", "secret": "s"},
    "endpoint": {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9000"},
    "endpoint of the client": {"client_kwargs": {"endpoint_url": "http://127.0.0.1:9000"}},
    "region": {"client_kwargs": {"region_name": "eu-central-1"}},
    "plain http": {"use_ssl": False, "client_kwargs": {"region_name": "us-west-2"}},
    "path style": {"config_kwargs": {"s3": {"addressing_style": "path"}}},
    "timeouts": {"config_kwargs": {"read_timeout": 7, "connect_timeout": 3}},
    "proxy": {"config_kwargs": {"proxies": {"https": "http://127.0.0.1:3128"}}},
    "s3fs's own matters": {"default_block_size": 1 << 20, "version_aware": True, "max_concurrency": 3},
}


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from the environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from the environment too")


def _facts(client: Any) -> dict[str, Any]:
    config = client.meta.config
    credentials = client._request_signer._credentials
    return {
        "endpoint": client.meta.endpoint_url,
        "region": client.meta.region_name,
        "signature": str(config.signature_version),
        "keys": credentials and (credentials.access_key, credentials.secret_key, credentials.token),
        "addressing": (config.s3 or {}).get("addressing_style"),
        "proxies": config.proxies,
    }


@pytest.mark.parametrize(
    "name",
    [
        # A client costs 0.15 s of a core, and this makes two.
        pytest.param(name, marks=[] if name in {"keys", "endpoint", "anonymous"} else pytest.mark.thorough)
        for name in OPTIONS
    ],
)
def test_the_client_is_the_one_s3fs_would_make(name: str) -> None:
    options = OPTIONS[name]
    theirs = s3fs.S3FileSystem(**options, skip_instance_cache=True).s3
    ours = S3Client(options).fs.s3
    assert _facts(ours) == _facts(theirs)
    for asked, value in options.get("config_kwargs", {}).items():
        assert name == "path style" or getattr(ours.meta.config, asked) == value


@pytest.mark.parametrize(
    "options", [{"secrett": "hunter2"}, {"session": "hunter2"}, {"client_kwargs": "hunter2"}]
)
def test_what_s3fs_does_not_take_is_refused_without_its_value(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        S3Client(options).fs  # noqa: B018 - connects
    assert "hunter2" not in str(caught.value)


def test_a_request_carries_what_the_options_ask_of_each() -> None:
    client = S3Client({"requester_pays": True, "s3_additional_kwargs": {"ServerSideEncryption": "AES256"}})
    sent: dict[str, Any] = {}
    client.fs.s3.meta.events.register(
        "provide-client-params.s3.*", lambda params, **_: sent.update(params) or params
    )
    with pytest.raises(StorageError):  # a prefix is no number, so nothing is sent
        client.call("list_objects_v2", "s3://none-such", Bucket="none-such", Prefix=3)
    assert "ServerSideEncryption" not in sent  # a listing takes none
    assert sent["RequestPayer"] == "requester"


def test_what_fsspec_is_configured_with_is_heeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "conf.json").write_text(json.dumps({"s3": {"key": "configured"}}))
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", str(tmp_path))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "configured", "secret": "s"})
    assert read_options({}).s3fs["key"] == "configured"
    assert read_options({"key": "given"}).s3fs["key"] == "given"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"endpoint_url": "https://abc.r2.cloudflarestorage.com"}, True),
        ({"endpoint_url": "https://abc.r2.cloudflarestorage.com", "equal_parts": False}, False),
        ({"equal_parts": True}, True),
        ({"fixed_upload_size": True}, True),
    ],
)
def test_equal_parts_where_the_store_wants_them(options: dict[str, Any], expected: bool) -> None:
    assert S3Client(options).equal_parts is expected


@pytest.mark.parametrize(
    ("path", "bucket", "key"),
    [
        ("bucket/a/b", "bucket", "a/b"),
        ("bucket", "bucket", ""),
        ("arn:aws:s3:us-west-2:123456789012:accesspoint/mine/a/b",
         "arn:aws:s3:us-west-2:123456789012:accesspoint/mine", "a/b"),
        ("arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/accesspoint/mine/a",
         "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/accesspoint/mine", "a"),
        ("arn:aws-cn:s3-object-lambda:cn-north-1:123456789012:accesspoint/mine/a",
         "arn:aws-cn:s3-object-lambda:cn-north-1:123456789012:accesspoint/mine", "a"),
    ],
)  # fmt: skip
def test_paths_divide_as_s3fs_divides_them(path: str, bucket: str, key: str) -> None:
    at = S3Object.of_path(S3Client({}), path)
    assert (at.bucket, at.key) == (bucket, key)
    assert tuple(s3fs.S3FileSystem(anon=True).split_path(path)[:2]) == (bucket, key)
