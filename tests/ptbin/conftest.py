"""The servers that tests of whole conversions talk to, and the processes of restore, started quickly."""

from tests.distributed_folders import dcp_folders
from tests.servers.fixtures import moto_s3, rados_s3, warm_children

__all__ = ["dcp_folders", "moto_s3", "rados_s3", "warm_children"]
