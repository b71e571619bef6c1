"""The servers that the S3 subclasses of the contract run against."""

from tests.servers.fixtures import moto_s3, rados_s3
from tests.servers.other_stores import azure_storage, google_storage, sftp_server

__all__ = ["azure_storage", "google_storage", "moto_s3", "rados_s3", "sftp_server"]
