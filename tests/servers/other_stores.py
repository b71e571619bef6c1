"""Servers of other protocols that fsspec speaks, on loopback: Google's and Azure's storage emulated, sshd.

`make store-packages` installs what they need; where something is missing, the fixtures skip.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["azure_storage", "google_storage", "sftp_server"]

AZURITE = Path(sys.prefix) / "azurite/node_modules/azurite/dist/src/blob/main.js"
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own, as its documentation prints it; a key to nothing else."""
START_S = 30.0


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def _wait_until_it_listens(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{process.args!r}: {log.read_text(errors='replace')}") from None
            time.sleep(0.05)
        else:
            return


def _gone(request: object, response: Any, storage: object) -> None:
    del request, storage
    response.status = HTTPStatus.NO_CONTENT


def _running(command: list[str], port: int, folder: Path) -> Iterator[None]:
    log = folder / "log"
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out) as process,
    ):
        try:
            _wait_until_it_listens(port, process, log)
            yield
        finally:
            process.kill()


@pytest.fixture(scope="session")
def google_storage() -> Iterator[dict[str, Any]]:
    """Storage options for a stub of Google's API, in this process."""
    gcsfs = pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="make store-packages")
    # gcsfs's other class asks Google by gRPC what kind of bucket it is, which the stub does not speak.
    fsspec.register_implementation("gs", gcsfs.core.GCSFileSystem, clobber=True)
    for pattern, methods in emulator.HANDLERS:
        if "/upload" in pattern:  # the stub knows no giving up of an upload
            methods["DELETE"] = _gone
    port = _free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True)
    server.start()
    try:
        yield {"token": "anon", "project": "ptbin", "endpoint_url": f"http://127.0.0.1:{port}"}
    finally:
        server.stop()


@pytest.fixture(scope="session")
def azure_storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Storage options for Azurite, Microsoft's own emulator of Azure's blobs."""
    pytest.importorskip("adlfs", reason="make store-packages")
    node = shutil.which("node")
    if node is None or not AZURITE.exists():
        pytest.skip("no node, or no azurite: make store-packages")
    folder, port = tmp_path_factory.mktemp("azurite"), _free_port()
    command = [node, str(AZURITE), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--disableTelemetry"]
    endpoint = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
    said = {"AccountName": AZURE_ACCOUNT, "AccountKey": AZURE_KEY, "BlobEndpoint": endpoint}
    text = ";".join(f"{key}={value}" for key, value in {"DefaultEndpointsProtocol": "http", **said}.items())
    for _ in _running(command, port, folder):
        yield {"connection_string": text}


@pytest.fixture(scope="session")
def sftp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Storage options for an sshd on loopback that lets this user in by a key made for it."""
    pytest.importorskip("paramiko", reason="make store-packages")
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if sshd is None:
        pytest.skip("no sshd: apt-get install openssh-server")
    folder, port = tmp_path_factory.mktemp("sshd"), _free_port()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd gives up its privileges
    for name in ("host", "user"):
        made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(made, check=True)
    settings = {
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    command = [sshd, "-D", "-e", "-f", str(folder / "config"), "-p", str(port)]
    user = {"username": "root" if os.geteuid() == 0 else os.environ["USER"]}
    for _ in _running(command, port, folder):
        yield {"port": port, **user, "key_filename": str(folder / "user"), "look_for_keys": False}
