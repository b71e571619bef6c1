"""The servers that tests of whole conversions talk to."""

from tests.servers.fixtures import moto_s3, rados_s3

__all__ = ["moto_s3", "rados_s3"]
