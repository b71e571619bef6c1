"""The servers that the S3 tests talk to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.servers.faulty_proxy import FaultyProxy, faulty_proxy
from tests.servers.fixtures import moto_s3, rados_s3

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.endpoint import S3Endpoint

__all__ = ["moto_s3", "proxy", "rados_s3"]


@pytest.fixture
def proxy(moto_s3: S3Endpoint) -> Iterator[FaultyProxy]:
    """A proxy to moto without faults; a test appends those it wants."""
    with faulty_proxy(moto_s3.url) as running:
        yield running
