"""Files to and from S3 as one does by hand: boto3's own transfers, with their defaults.

Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, ..., AWS_ENDPOINT_URL). A location is
`s3://bucket/key` or a local path. Knows nothing of ptbin, and nothing of checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import boto3


def split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def fetch(uri: str, folder: Path) -> Path:
    """The file itself where it is local, else a download under its own name."""
    if not uri.startswith("s3://"):
        return Path(uri)
    bucket, key = split(uri)
    path = folder / key.rpartition("/")[2]
    boto3.client("s3").download_file(bucket, key, str(path))
    return path


def place(uri: str, folder: Path) -> Path:
    """Where to write what is to end up at `uri`."""
    return folder / uri.rpartition("/")[2] if uri.startswith("s3://") else Path(uri)


def deliver(path: Path, uri: str) -> None:
    """Upload what was written to `place(uri)`; nothing to do where that is its place already."""
    if uri.startswith("s3://"):
        boto3.client("s3").upload_file(str(path), *split(uri))
