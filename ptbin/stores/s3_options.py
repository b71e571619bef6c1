"""What users of fsspec write as storage options for S3, as arguments for botocore.

The names and their meaning are those of `s3fs.S3FileSystem` (2026.2), so that one JSON file serves s3fs,
pandas and ptbin; tests compare with the client that s3fs itself makes. s3fs is not imported for it: that
alone takes longer than a small conversion. Where fsspec has a configuration of its own (`FSSPEC_*`
variables, files in `~/.config/fsspec`), it is asked, as s3fs would.

Options beside s3fs's: `server_side_copy` (false: stream through this machine even within one store) and
`equal_parts` (true: every part of an upload but the last has one size, as Cloudflare R2 wants; found out by
itself for R2's own hosts).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptbin.errors import UsageError

__all__ = ["S3Options", "read_options"]

CONFIG_DEFAULTS: dict[str, Any] = {
    # Newer botocore sends and asks for checksums that several S3-compatible stores refuse.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    # CompleteMultipartUpload and part copies of some gigabytes take longer than s3fs's 15 s.
    "read_timeout": 60,
    "connect_timeout": 10,
    "max_pool_connections": 64,
    # Ours repeat what botocore's do not (bodies that break off), and two layers multiply the attempts.
    "retries": {"total_max_attempts": 1, "mode": "standard"},
    "tcp_keepalive": True,
}
# A SHA-256 of each body over again would cost more than sending it; outputs are proven by other means.
S3_CONFIG_DEFAULTS: dict[str, Any] = {"payload_signing_enabled": False}

# Options of s3fs that steer its own caching and threading; they mean nothing here.
_WITHOUT_MEANING = frozenset(
    """asynchronous loop use_listings_cache listings_expiry_time max_paths skip_instance_cache batch_size
    default_block_size default_fill_cache default_cache_type max_concurrency fixed_upload_size cache_regions
    version_aware local_expiry_check protocol""".split()
)
_MEANT = frozenset(
    """anon endpoint_url key secret token username password use_ssl client_kwargs config_kwargs requester_pays
    s3_additional_kwargs profile server_side_copy equal_parts""".split()
)
_EQUAL_PARTS_HOSTS = (".r2.cloudflarestorage.com",)


@dataclass(frozen=True, slots=True)
class S3Options:
    """Arguments of `botocore.session.Session`, `Session.create_client` and `Config`; never shown."""

    profile: str | None = field(repr=False)
    client: dict[str, Any] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    each_request: dict[str, Any] = field(repr=False)
    """Added to the calls that take them: requester pays, encryption, ACL."""
    anonymous: bool
    server_side_copy: bool
    equal_parts: bool

    @property
    def endpoint_url(self) -> str | None:
        return self.client.get("endpoint_url")


def read_options(options: Mapping[str, Any]) -> S3Options:
    """Raises UsageError for an option that is unknown or of the wrong kind; its text names no value."""
    options = {**_fsspec_configuration(), **options}
    unknown = sorted(set(options) - _MEANT - _WITHOUT_MEANING)
    if unknown:
        raise UsageError(f"the storage options for S3 are not what s3fs takes: {', '.join(unknown)}")
    client = _mapping(options, "client_kwargs")
    config = {**CONFIG_DEFAULTS, **_mapping(options, "config_kwargs")}
    config["s3"] = {**S3_CONFIG_DEFAULTS, **_mapping(config, "s3")}
    anonymous = bool(options.get("anon"))
    named = {
        "aws_access_key_id": _either(options, "key", "username"),
        "aws_secret_access_key": _either(options, "secret", "password"),
        "aws_session_token": options.get("token"),
    }
    if anonymous:
        client = {name: value for name, value in client.items() if name not in named}
    else:
        client = {**{name: value for name, value in named.items() if value is not None}, **client}
    if options.get("endpoint_url") is not None:
        client.setdefault("endpoint_url", options["endpoint_url"])
    client.setdefault("use_ssl", options.get("use_ssl", True))
    each_request = _mapping(options, "s3_additional_kwargs")
    if options.get("requester_pays"):
        each_request["RequestPayer"] = "requester"
    host = str(client.get("endpoint_url") or "").partition("://")[2].partition("/")[0].partition(":")[0]
    return S3Options(
        options.get("profile"),
        client,
        config,
        each_request,
        anonymous,
        bool(options.get("server_side_copy", True)),
        bool(options.get("equal_parts", host.endswith(_EQUAL_PARTS_HOSTS))),
    )


def _mapping(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = options.get(name) or {}
    if not isinstance(value, Mapping):
        raise UsageError(f"the storage option {name} is not a mapping")
    return dict(value)


def _either(options: Mapping[str, Any], name: str, other: str) -> Any:
    if options.get(name) and options.get(other):
        raise UsageError(f"the storage options {name} and {other} say the same thing twice")
    return options.get(name) or options.get(other)


def _fsspec_configuration() -> dict[str, Any]:
    """Defaults that fsspec would give s3fs; importing it to find none is spared where there can be none."""
    folder = Path(os.environ.get("FSSPEC_CONFIG_DIR") or Path("~/.config/fsspec").expanduser())
    if not folder.is_dir() and not any(name.startswith("FSSPEC_S3") for name in os.environ):
        return {}
    from fsspec.config import conf

    return dict(conf.get("s3", {}))
