"""What a test needs to know of an S3 server, whichever it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ptbin.stores.requests import RetryPolicy
from ptbin.stores.s3 import S3Store

__all__ = ["QUICK", "S3Endpoint"]

QUICK = RetryPolicy(attempts=4, first_delay_s=0.01, max_delay_s=0.02)
"""The production schedule's shape without its waits."""


@dataclass(frozen=True)
class S3Endpoint:
    """Where a server listens and how it lets us in."""

    url: str
    key: str = "s3test"
    secret: str = "s3testsecret"

    @property
    def storage_options(self) -> dict[str, Any]:
        """As `--source-options` takes them."""
        return {
            "key": self.key,
            "secret": self.secret,
            "endpoint_url": self.url,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def store(self, *, retry: RetryPolicy = QUICK, **options: Any) -> S3Store:
        return S3Store({**self.storage_options, **options}, retry=retry)

    def make_bucket(self, *, versioned: bool = False) -> str:
        """A fresh bucket; the servers are thrown away whole, so nobody cleans up."""
        bucket = f"bucket-{os.urandom(6).hex()}"
        client = self.store().client
        client.call("create_bucket", bucket, Bucket=bucket)
        if versioned:
            status = {"Status": "Enabled"}
            client.call("put_bucket_versioning", bucket, Bucket=bucket, VersioningConfiguration=status)
        return bucket

    def empty(self, bucket: str) -> None:
        """Delete what a test has stored there: the real server keeps everything in memory, twice."""
        store = self.store()
        for item in list(store.iter_objects(bucket)):
            store.delete(f"{bucket}/{item.path}")

    def uploads_in(self, bucket: str) -> list[str]:
        """Keys of the multipart uploads that were begun and neither completed nor aborted."""
        answer = self.store().client.call("list_multipart_uploads", bucket, Bucket=bucket)
        return [upload["Key"] for upload in answer.get("Uploads", ())]
