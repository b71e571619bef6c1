"""The servers that conversions are killed against, and that fail them; restore with quick processes."""

from tests.servers.fixtures import moto_s3, rados_s3, warm_children

__all__ = ["moto_s3", "rados_s3", "warm_children"]
