"""Session fixtures; a folder's conftest imports those it wants: `from tests.servers.fixtures import moto_s3`.

Each server starts at the first wish and once a session, however many folders import it.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from ptbin.restoring import children
from tests.servers.endpoint import S3Endpoint
from tests.servers.rados_gateway import RadosGateway, missing_programs
from tests.warm_python import stand_in

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["moto_s3", "rados_s3", "warm_children"]

_MOTO = pytest.StashKey[S3Endpoint]()
_RADOS = pytest.StashKey[S3Endpoint]()


def _once(
    config: pytest.Config, key: pytest.StashKey[S3Endpoint], start: Callable[[pytest.Config], S3Endpoint]
) -> S3Endpoint:
    if key not in config.stash:
        config.stash[key] = start(config)
    return config.stash[key]


@pytest.fixture(scope="session")
def moto_s3(pytestconfig: pytest.Config) -> S3Endpoint:
    """moto's server in this process: quick to start, checks no signatures and no checksums."""
    return _once(pytestconfig, _MOTO, _start_moto)


def _start_moto(config: pytest.Config) -> S3Endpoint:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    config.add_cleanup(server.stop)
    host, port = server.get_host_and_port()
    return S3Endpoint(f"http://{host}:{port}")


@pytest.fixture(scope="session")
def rados_s3(pytestconfig: pytest.Config) -> S3Endpoint:
    """Ceph's gateway: a real S3 server. Skips where it is not installed; mark such tests `s3_real`."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install ceph-mon ceph-osd radosgw")
    return _once(pytestconfig, _RADOS, _start_rados)


def _start_rados(config: pytest.Config) -> S3Endpoint:
    # It hangs when it is full: room for what the suite stores in a quarter of a minute, many times over.
    gateway = RadosGateway(capacity_nbytes=6 << 30, gc_wait_s=15)
    config.add_cleanup(gateway.stop)
    return gateway.start()


class _Killed(subprocess.Popen[bytes]):
    """A stand-in that is killed outright ends before what it stands for; this way both end."""

    kill = subprocess.Popen.terminate


@pytest.fixture
def warm_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore's child processes are forked from one that has torch."""
    monkeypatch.setattr(sys, "executable", stand_in())
    monkeypatch.setattr(children, "subprocess", SimpleNamespace(Popen=_Killed, PIPE=subprocess.PIPE))
