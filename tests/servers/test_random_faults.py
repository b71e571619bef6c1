"""The proxy that fails at random: without faults it changes nothing, with them it does what it says."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.servers.random_faults import Faults, RandomFaults, random_faults

CONTENT = bytes(range(256)) * 4096


class _Echo(BaseHTTPRequestHandler):
    """GET answers CONTENT (at /chunked in chunks), PUT the length of what came and the Host header."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (CONTENT[:100_000], CONTENT[100_000:]):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
            return
        self._end(CONTENT)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self._end(f"{len(body)} {self.headers['Host']}".encode())

    def _end(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Cut connections are the point here."""


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), _Echo)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def _connect(proxy: RandomFaults) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)


def _exchange(proxy: RandomFaults, method: str, body: bytes | None) -> bytes:
    with contextlib.closing(_connect(proxy)) as connection:
        connection.request(method, "/", body)
        with contextlib.closing(connection.getresponse()) as answer:
            return answer.read()


def test_without_faults_it_is_a_relay_that_counts(target: str) -> None:
    with random_faults(target) as proxy:
        connection = _connect(proxy)
        for path in ("/", "/chunked"):
            connection.request("GET", path)
            assert connection.getresponse().read() == CONTENT
        connection.request("HEAD", "/")
        answer = connection.getresponse()
        assert (answer.getheader("Content-Length"), answer.read()) == (str(len(CONTENT)), b"")
        connection.request("PUT", "/", CONTENT, {"Host": "signed.example"})
        assert connection.getresponse().read() == b"%d signed.example" % len(CONTENT)
        connection.request("PUT", "/", b"12345", {"Expect": "100-continue"})
        assert connection.getresponse().read().startswith(b"5 ")
        connection.close()
        counts = proxy.counts
    assert counts.requests == 5
    assert counts.faults == 0
    assert 0 < counts.bytes_from_clients - len(CONTENT) < 2000
    assert 0 < counts.bytes_to_clients - 2 * len(CONTENT) < 2000


def test_a_503_leaves_the_connection_usable(target: str) -> None:
    with random_faults(target, Faults(p503=1.0)) as proxy:
        connection = _connect(proxy)
        for method, body in (("GET", None), ("PUT", CONTENT), ("HEAD", None), ("PUT", b"")):
            connection.request(method, "/", body)
            answer = connection.getresponse()
            assert answer.status == 503
            assert (b"SlowDown" in answer.read()) == (method != "HEAD")
        connection.close()
        assert (proxy.counts.requests, proxy.counts.answered_503) == (4, 4)
        assert proxy.struck[1] == "503: PUT /"


def test_a_cut_connection_is_seen_as_one(target: str) -> None:
    with random_faults(target, Faults(seed=1, cut=1.0)) as proxy:
        for method, body in (("GET", None), ("HEAD", None), *[("PUT", CONTENT)] * 10):
            with pytest.raises((OSError, http.client.HTTPException)):
                _exchange(proxy, method, body)
        counts = proxy.counts
    assert counts.cut_requests > 0
    assert counts.cut_answers > 2
    assert counts.cut_requests + counts.cut_answers == 12


@pytest.mark.starts_processes
def test_as_a_process_it_prints_its_url_and_its_counts(target: str) -> None:
    argv = [
        sys.executable,
        "-m",
        "tests.servers.random_faults",
        "--target",
        target,
        "--spike",
        "1",
        "--spike-s",
        "0",
    ]
    # As a command by hand: from the top folder, which `-P` in this process's environment would hide.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    top = Path(__file__).parents[2]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=top, env=environment)
    assert process.stdout is not None
    connection = http.client.HTTPConnection(urlsplit(process.stdout.readline().strip()).netloc, timeout=10)
    connection.request("GET", "/")
    assert connection.getresponse().read() == CONTENT
    connection.close()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    counts = json.loads(said)
    assert (counts["requests"], counts["spikes"]) == (1, 1)
