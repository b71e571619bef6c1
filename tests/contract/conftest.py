"""The servers that the S3 subclasses of the contract run against."""

from tests.servers.fixtures import moto_s3, rados_s3

__all__ = ["moto_s3", "rados_s3"]
