"""The servers that the S3 tests talk to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.servers.endpoint import S3Endpoint
from tests.servers.faulty_proxy import FaultyProxy, faulty_proxy
from tests.servers.fixtures import moto_s3, rados_s3

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ptbin.stores.s3 import S3Store

__all__ = ["moto_s3", "proxy", "rados_s3"]


@pytest.fixture
def proxy(moto_s3: S3Endpoint) -> Iterator[FaultyProxy]:
    """A proxy to moto without faults; a test appends those it wants."""
    with faulty_proxy(moto_s3.url) as running:
        yield running


@pytest.fixture
def bucket(moto_s3: S3Endpoint) -> str:
    return moto_s3.make_bucket()


@pytest.fixture
def store(proxy: FaultyProxy) -> S3Store:
    """A store that talks through the proxy."""
    return S3Endpoint(proxy.url).store()
