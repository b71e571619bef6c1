"""Storage options out of the blocks in which Prefect users keep credentials; none of them is ever shown.

| reference | block | becomes options of |
|---|---|---|
| `block:NAME`, `block:secret/NAME` | Secret | what the JSON object says |
| `block:aws-credentials/NAME` | AWS Credentials (prefect-aws) | s3fs |
| `block:minio-credentials/NAME` | MinIO Credentials (prefect-aws) | s3fs |
| `block:s3-bucket/NAME` | S3 Bucket (prefect-aws), its credentials | s3fs |
| `block:gcp-credentials/NAME` | GCP Credentials (prefect-gcp) | gcsfs |
| `block:remote-file-system/NAME` | Remote File System, its settings | the filesystem of its `basepath` |

A block with a role to assume gives s3fs a session that assumes it anew before the credentials end: a night's
run is longer than the hour for which STS gives them. Costs: one request to Prefect's server for each block.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from ptbin.errors import UsageError
from ptbin.installed import missing_line

if TYPE_CHECKING:
    from prefect.blocks.core import Block

STS_SECONDS = 3600
"""How long the credentials of an assumed role hold unless stated otherwise (STS API, `AssumeRole`)."""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """Where the class of a block lies, what installs it, and how its fields become storage options."""

    module: str
    name: str
    package: str
    options: Callable[[Any], Any]


def read_block(slug: str, name: str) -> Any:
    """What the block `slug/name` comes to: a mapping of storage options, or whatever a Secret holds.

    Raises:
        UsageError: an unknown kind of block, its package or the block itself is missing, or it cannot be
            used. Never quotes what it holds.
    """
    kind = KINDS.get(slug)
    if kind is None:
        raise UsageError(
            f"storage options: {slug} is not a kind of block that holds any; {', '.join(KINDS)} are"
        )
    try:
        block = _load(kind, name)
    except ImportError as error:
        where = f"the block {slug}/{name}"
        raise UsageError(missing_line(kind.package, where)) from error
    except Exception as error:  # noqa: BLE001 - a block's class may raise anything while it sets itself up
        # Not its text, nor as a cause: pydantic quotes the values that it refuses.
        if isinstance(error, ValueError) and "Unable to find block document" in str(error):
            raise UsageError(f"storage options: Prefect's server has no block {slug}/{name}") from None
        raise UsageError(
            f"storage options: the block {slug}/{name} cannot be used here ({type(error).__name__})"
        ) from None
    return kind.options(block)


def _load(kind: BlockKind, name: str) -> Block:
    import importlib

    from prefect.blocks.core import Block

    module = importlib.import_module(kind.module)
    block_class = getattr(module, kind.name)
    assert issubclass(block_class, Block)
    return cast("Block", block_class.load(name))


def _secret(block: Any) -> Any:
    return block.get()


def _aws(block: Any) -> dict[str, Any]:
    """`AwsCredentials`: keys, session token, profile, region, role, and the parameters of the client."""
    options = _client_options(block.aws_client_parameters, block.region_name)
    if block.assume_role_arn:
        return options | {"session": _role_session(block)}
    secret = block.aws_secret_access_key
    return options | _present(
        key=block.aws_access_key_id,
        secret=secret.get_secret_value() if secret is not None else None,
        token=block.aws_session_token,
        profile=block.profile_name,
    )


def _minio(block: Any) -> dict[str, Any]:
    """`MinIOCredentials`: its root user is the key; where it listens stands in the client's parameters."""
    return _client_options(block.aws_client_parameters, block.region_name) | {
        "key": block.minio_root_user,
        "secret": block.minio_root_password.get_secret_value(),
    }


def _bucket(block: Any) -> dict[str, Any]:
    credentials = block.credentials
    return _minio(credentials) if hasattr(credentials, "minio_root_user") else _aws(credentials)


def _client_options(parameters: Any, region: str | None) -> dict[str, Any]:
    """`AwsClientParameters` as arguments of `S3FileSystem`."""
    config = dict(parameters.config or {})
    unsigned = config.get("signature_version") == "unsigned"
    if unsigned:
        del config["signature_version"]
    # A path wins over the deprecated one in `verify`, as in `AwsClientParameters.get_params_override`.
    verify = parameters.verify if parameters.verify_cert_path is None else parameters.verify_cert_path
    client = _present(
        region_name=region,
        api_version=parameters.api_version,
        verify=verify if verify is None or isinstance(verify, bool) else str(verify),
    )
    options = _present(
        endpoint_url=parameters.endpoint_url, client_kwargs=client or None, config_kwargs=config or None
    )
    if not parameters.use_ssl:
        options["use_ssl"] = False
    if unsigned:
        options["anon"] = True
    return options


def _gcp(block: Any) -> dict[str, Any]:
    """`GcpCredentials`: the key file or its content, else what Google's own search finds."""
    info, file = block.service_account_info, block.service_account_file
    token: Any = "google_default"  # noqa: S105 - gcsfs's word for that search
    if info is not None:
        token = info.get_secret_value()
    elif file is not None:
        token = str(file)
    return _present(project=block.project, token=token)


def _remote(block: Any) -> dict[str, Any]:
    return dict(block.settings or {})


KINDS: Mapping[str, BlockKind] = {
    "secret": BlockKind("prefect.blocks.system", "Secret", "prefect", _secret),
    "aws-credentials": BlockKind("prefect_aws", "AwsCredentials", "prefect-aws", _aws),
    "minio-credentials": BlockKind("prefect_aws", "MinIOCredentials", "prefect-aws", _minio),
    "s3-bucket": BlockKind("prefect_aws", "S3Bucket", "prefect-aws", _bucket),
    "gcp-credentials": BlockKind("prefect_gcp", "GcpCredentials", "prefect-gcp", _gcp),
    "remote-file-system": BlockKind("prefect.filesystems", "RemoteFileSystem", "prefect", _remote),
}


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


# -- roles that are assumed ----------------------------------------------------------------------


def _role_session(block: Any) -> Any:
    """A session for s3fs (`session=`) whose credentials are those of the block's role.

    The block itself asks STS, with all its parameters. aiobotocore's session has them from a provider in its
    credential chain, whose RefreshableCredentials ask again in time (botocore: 15 minutes before the end).
    """
    from aiobotocore.credentials import AioRefreshableCredentials
    from aiobotocore.session import AioSession
    from botocore.credentials import CredentialProvider

    seconds = block.assume_role_kwargs.get_params_override().get("DurationSeconds", STS_SECONDS)

    def ask() -> dict[str, str]:
        asked = datetime.now(UTC)
        found = block.get_boto3_session().get_credentials()
        return {
            "access_key": found.access_key,
            "secret_key": found.secret_key,
            "token": found.token,
            "expiry_time": (asked + timedelta(seconds=seconds)).isoformat(),
        }

    async def refresh() -> dict[str, str]:
        return await asyncio.to_thread(ask)

    class RoleProvider(CredentialProvider):  # type: ignore[misc]
        METHOD = "prefect-block-role"
        CANONICAL_NAME = "PrefectBlockRole"

        async def load(self) -> Any:
            return AioRefreshableCredentials.create_from_metadata(
                await refresh(), refresh_using=refresh, method=self.METHOD
            )

    session = AioSession()
    session.get_component("credential_provider").insert_before("env", RoleProvider())
    return session
