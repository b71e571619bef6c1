"""Storage options for S3 are s3fs's (`s3fs.S3FileSystem`), read by s3fs; here are ptbin's defaults for them.

They give way to what the caller, or fsspec's configuration (`FSSPEC_*` variables, `~/.config/fsspec`), says.

Options beside s3fs's: `server_side_copy` (false: stream through this machine even within one store) and
`equal_parts` (true: every part of an upload but the last has one size, as Cloudflare R2 wants; found out by
itself for R2's own hosts, and where s3fs's `fixed_upload_size` asks for it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ptbin.errors import UsageError
from ptbin.version import __version__

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
    # botocore would else describe system, Python and configuration anew for each request, twice.
    "user_agent": f"ptbin/{__version__}",
}
# A SHA-256 of each body over again would cost more than sending it; outputs are proven by other means.
S3_CONFIG_DEFAULTS: dict[str, Any] = {"payload_signing_enabled": False}

# Ours to say: one filesystem for each set of options, on fsspec's loop, which keeps no listing.
FIXED: dict[str, Any] = {
    "asynchronous": False,
    "loop": None,
    "use_listings_cache": False,
    "skip_instance_cache": True,
}
_EQUAL_PARTS_HOSTS = (".r2.cloudflarestorage.com",)


@dataclass(frozen=True, slots=True)
class S3Options:
    """Arguments of `S3FileSystem`, never shown; and the options that are ptbin's own."""

    s3fs: dict[str, Any] = field(repr=False)
    server_side_copy: bool
    equal_parts: bool | None

    @property
    def metadata(self) -> dict[str, str]:
        """What every object that is written is to carry, as the options say."""
        return dict(self.s3fs["s3_additional_kwargs"].get("Metadata") or {})

    def wants_equal_parts(self, endpoint_url: str) -> bool:
        if self.equal_parts is not None:
            return self.equal_parts
        return (urlsplit(endpoint_url).hostname or "").endswith(_EQUAL_PARTS_HOSTS)


def read_options(options: Mapping[str, Any]) -> S3Options:
    """Raises UsageError for an option of the wrong kind; its text names no value."""
    from fsspec.config import conf

    given = {**conf.get("s3", {}), **options, **FIXED}
    config = {**CONFIG_DEFAULTS, **_mapping(given, "config_kwargs")}
    config["s3"] = {**S3_CONFIG_DEFAULTS, **_mapping(config, "s3")}
    given["config_kwargs"] = config
    given["client_kwargs"] = _mapping(given, "client_kwargs")
    given["s3_additional_kwargs"] = _mapping(given, "s3_additional_kwargs")
    given.pop("protocol", None)
    server_side_copy = bool(given.pop("server_side_copy", True))
    equal_parts = given.pop("equal_parts", True if given.get("fixed_upload_size") else None)
    return S3Options(given, server_side_copy, None if equal_parts is None else bool(equal_parts))


def _mapping(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = options.get(name) or {}
    if not isinstance(value, Mapping):
        raise UsageError(f"the storage option {name} is not a mapping")
    return dict(value)
