"""Where a browser opens the report of a run: a link, if anything serves the destination.

| destination | link |
|---|---|
| below a prefix of `PTBIN_SERVED` (`s3://models=https://models.example ...`) | that site |
| `http://`, `https://` | itself |
| `s3://`, with `PTBIN_PRESIGN=7d` | signed for that long (all who see the run can then read the report) |
| `s3://` at AWS, `gs://` | the provider's console, which asks who is there |
| a local path | `file://`, for a browser on that machine |

Nothing else has a link: another S3 endpoint serves nothing to browsers by itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from flows.environment import PRESIGN, SERVED
from flows.parsing import parse_duration


def link_of(uri: str, options: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> str | None:
    """What opens the object at `uri`; None where nothing is known to.

    `options` are the storage options with which it was written: where S3 is, and what signs links.
    """
    if (served := served_at(uri, environment.get(SERVED, ""))) is not None:
        return served
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        return uri
    if scheme in ("s3", "s3a"):
        return _s3_link(uri, options, environment)
    bucket, _, key = uri.partition("://")[2].partition("/")
    if scheme in ("gs", "gcs"):
        return f"https://console.cloud.google.com/storage/browser/_details/{quote(bucket)}/{quote(key)}"
    if scheme in ("", "file", "local"):
        path = os.path.abspath(os.path.expanduser(uri.removeprefix("file://").removeprefix("local://")))
        return f"file://{quote(path)}"
    return None


def served_at(uri: str, served: str) -> str | None:
    """The address of `uri` by the longest prefix that `served` (`PREFIX=URL`, separated by spaces) names."""
    best: tuple[str, str] | None = None
    for pair in served.split():
        prefix, equals, url = pair.partition("=")
        prefix = prefix.rstrip("/")
        if (
            equals
            and (uri == prefix or uri.startswith(f"{prefix}/"))
            and (best is None or len(prefix) > len(best[0]))
        ):
            best = prefix, url.rstrip("/")
    return None if best is None else best[1] + quote(uri.removeprefix(best[0]))


def _s3_link(uri: str, options: Mapping[str, Any], environment: Mapping[str, str]) -> str | None:
    if PRESIGN in environment:
        return _signed(uri, options, environment[PRESIGN])
    client = options.get("client_kwargs") or {}
    endpoint = (
        options.get("endpoint_url")
        or client.get("endpoint_url")
        or environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
        or ""
    )
    if endpoint and not (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return None
    bucket, _, key = uri.partition("://")[2].partition("/")
    return f"https://console.aws.amazon.com/s3/object/{quote(bucket)}?prefix={quote(key, safe='')}"


def _signed(uri: str, options: Mapping[str, Any], duration: str) -> str | None:
    import fsspec

    try:
        seconds = int(parse_duration(duration))
        filesystem, path = fsspec.url_to_fs(uri, **{**options, "skip_instance_cache": True})
        return str(filesystem.sign(path, expiration=seconds))
    except Exception:  # noqa: BLE001 - of any client: no credentials, no signatures; the report is there all the same
        return None
