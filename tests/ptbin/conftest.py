"""The servers that tests of whole conversions talk to, and the processes of restore, started quickly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ptbin.restoring import children
from tests.servers.fixtures import moto_s3, rados_s3
from tests.warm_children import Warm, warm

__all__ = ["moto_s3", "rados_s3"]


@pytest.fixture(scope="session")
def warm_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with warm(tmp_path_factory.mktemp("warm")) as process:
        yield process


@pytest.fixture
def warm_children(warm_process: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore's child processes are forked from one that has torch (`tests.warm_children`)."""
    monkeypatch.setattr(children, "subprocess", warm_process)
