"""The server that conversions to S3 are killed against."""

from tests.servers.fixtures import moto_s3

__all__ = ["moto_s3"]
