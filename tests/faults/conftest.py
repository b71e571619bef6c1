"""The servers that conversions are killed against, and that fail them."""

from tests.servers.fixtures import moto_s3, rados_s3

__all__ = ["moto_s3", "rados_s3"]
