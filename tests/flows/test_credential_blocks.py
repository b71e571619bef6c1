"""Credentials in Prefect's blocks: saved on a server, used on moto, shown nowhere."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from flows.convert import convert
from flows.prefect.orchestrator import Orchestrator
from ptbin.errors import UsageError
from ptbin.stores import open_store
from tasks.credentials import load_options
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import moto_s3

__all__ = ["moto_s3"]

prefect_aws = pytest.importorskip("prefect_aws")
SECRET = "pssst-the-secret-key"
PASSWORD = "pssst-the-root-password"
TOKEN = "pssst-the-session-token"


def aws_block(**changes: Any) -> Any:
    values: dict[str, Any] = {"aws_access_key_id": "AKID", "aws_secret_access_key": SECRET}
    return prefect_aws.AwsCredentials(**(values | changes))


def minio_block(url: str) -> Any:
    return prefect_aws.MinIOCredentials(
        minio_root_user="root",
        minio_root_password=PASSWORD,
        aws_client_parameters={"endpoint_url": url},
    )


@pytest.mark.usefixtures("server")
def test_fields_of_aws_blocks_are_options_of_s3fs() -> None:
    aws_block(
        aws_session_token=TOKEN,
        region_name="eu-west-3",
        aws_client_parameters={
            "endpoint_url": "https://s3.example",
            "use_ssl": True,
            "verify": False,
            "api_version": "2006-03-01",
            "config": {"max_pool_connections": 7},
        },
    ).save("full", overwrite=True)
    assert load_options("block:aws-credentials/full") == {
        "key": "AKID",
        "secret": SECRET,
        "token": TOKEN,
        "endpoint_url": "https://s3.example",
        "client_kwargs": {"region_name": "eu-west-3", "verify": False, "api_version": "2006-03-01"},
        "config_kwargs": {"max_pool_connections": 7},
    }
    prefect_aws.AwsCredentials(
        profile_name="nightly",
        aws_client_parameters={"config": {"signature_version": "unsigned"}, "use_ssl": False},
    ).save("profile", overwrite=True)
    assert load_options("block:aws-credentials/profile") == {
        "profile": "nightly",
        "anon": True,
        "use_ssl": False,
    }


@pytest.mark.usefixtures("server")
def test_a_bucket_stands_for_its_credentials_and_a_remote_file_system_for_its_settings() -> None:
    from prefect.filesystems import RemoteFileSystem

    minio = minio_block("http://minio.example:9000")
    minio.save("own", overwrite=True)
    wanted = {"key": "root", "secret": PASSWORD, "endpoint_url": "http://minio.example:9000"}
    assert load_options("block:minio-credentials/own") == wanted
    prefect_aws.S3Bucket(bucket_name="weights", credentials=minio).save("weights", overwrite=True)
    assert load_options("block:s3-bucket/weights") == wanted
    prefect_aws.S3Bucket(bucket_name="weights", credentials=aws_block()).save("cloud", overwrite=True)
    assert load_options("block:s3-bucket/cloud") == {"key": "AKID", "secret": SECRET}
    settings = {"username": "ptbin", "password": PASSWORD}
    RemoteFileSystem(basepath="sftp://host/weights", settings=settings).save("sftp", overwrite=True)
    assert load_options("block:remote-file-system/sftp") == settings


@pytest.mark.usefixtures("server")
def test_a_service_account_is_the_token_of_gcsfs() -> None:
    prefect_gcp = pytest.importorskip("prefect_gcp")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "project_id": "models",
        "private_key": key.decode(),
        "client_email": "ptbin@models.example",
        "token_uri": "https://oauth.example/token",
    }
    prefect_gcp.GcpCredentials(service_account_info=account).save("robot", overwrite=True)
    assert load_options("block:gcp-credentials/robot") == {"project": "models", "token": account}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("block:nothing-here", "no block secret/nothing-here"),
        ("block:aws-credentials/nothing-here", "no block aws-credentials/nothing-here"),
        ("block:slack-webhook/alerts", "slack-webhook is not a kind of block that holds any"),
        (f'{{"key": "k", "secret": "{SECRET}"}}', "never by value"),
        ("env:PTBIN_NOT_SET", "no environment variable PTBIN_NOT_SET"),
        ("block:secret/a-list", "does not hold a JSON object"),
    ],
)
def test_what_leads_nowhere_is_said_without_a_value(reference: str, told: str) -> None:
    from prefect.blocks.system import Secret

    Secret(value=[SECRET]).save("a-list", overwrite=True)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=told) as caught:
        load_options(reference)
    assert SECRET not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "prefect_aws", None)
    with pytest.raises(UsageError, match=r"aws-credentials/any needs prefect-aws.*pip install prefect-aws"):
        load_options("block:aws-credentials/any")


@pytest.mark.usefixtures("server")
def test_a_role_is_assumed_anew_before_its_credentials_end(
    moto_s3: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", moto_s3.url)
    aws_block(
        region_name="us-east-1",
        assume_role_arn="arn:aws:iam::123456789012:role/weights",
        # botocore renews 15 minutes before the end: these are due at once.
        assume_role_kwargs={"RoleSessionName": "nightly", "DurationSeconds": 900},
        aws_client_parameters={"endpoint_url": moto_s3.url},
    ).save("role", overwrite=True)
    bucket = moto_s3.make_bucket()
    options = load_options("block:aws-credentials/role")
    assert "key" not in options
    store, path = open_store(f"s3://{bucket}/there", options)
    store.write_bytes(path, b"content")
    assert store.read_bytes(path) == b"content"

    async def used() -> str:
        credentials = await options["session"].get_credentials()
        return str((await credentials.get_frozen_credentials()).access_key)

    async def used_twice() -> list[str]:
        return [await used(), await used()]

    first, second = asyncio.run(used_twice())
    assert first != second
    assert first.startswith("ASIA")  # of STS, not the block's own
    assert second.startswith("ASIA")


def test_a_run_with_blocks_shows_none_of_them(
    moto_s3: S3Endpoint,
    server: Orchestrator,
    good_source: Path,
    prefect_home: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bucket = moto_s3.make_bucket()
    source, _ = open_store(f"s3://{bucket}/in", moto_s3.storage_options)
    for file in good_source.iterdir():
        source.write_bytes(f"{bucket}/in/{file.name}", file.read_bytes())
    endpoint = {"endpoint_url": moto_s3.url}
    aws_block(region_name="us-east-1", aws_session_token=TOKEN, aws_client_parameters=endpoint).save("in")
    prefect_aws.S3Bucket(bucket_name=bucket, credentials=minio_block(moto_s3.url)).save("out")
    with caplog.at_level(logging.INFO):
        state = convert(
            f"s3://{bucket}/in",
            f"s3://{bucket}/out",
            source_options="block:aws-credentials/in",
            dest_options="block:s3-bucket/out",
            verify="checksum",
            runner="threads",
            return_state=True,
        )
    assert state.message is not None
    assert state.message.startswith("converted 6, ")
    server.settle(None, 0)
    written = [
        source.read_bytes(f"{bucket}/out/{item.path}") for item in source.iter_objects(f"{bucket}/out")
    ]
    assert any(b"block:" not in content and b'"manifest"' in content for content in written)
    database = b"".join(file.read_bytes() for file in prefect_home.glob("prefect.db*"))
    assert b"block:aws-credentials/in" in database
    for hidden in (SECRET, PASSWORD, TOKEN, moto_s3.secret):
        assert hidden not in caplog.text
        assert not any(hidden.encode() in content for content in written)
    # The token is in the event of Prefect's that a block was saved: prefect-aws does not hold it as a secret.
    assert not any(hidden.encode() in database for hidden in (SECRET, PASSWORD, moto_s3.secret))
