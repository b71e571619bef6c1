"""Take an object store's event notifications over HTTP, and tell Prefect which checkpoints arrived.

    python deployments/arrivals.py s3://training/runs --listen 127.0.0.1:8765

MinIO's webhook target, an HTTP endpoint of Ceph's gateway or an HTTP subscription of SNS posts here. What
arrives within some seconds is one event, `ptbin.checkpoints.arrived`, which starts the deployment
`convert-arrivals` with the paths as `files_from`. With `--token-variable NAME` only requests with
`Authorization: Bearer <value of NAME>` are heard.

Nothing is lost by a notification that is: the next run of the whole source finds the file.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prefect.events import emit_event

from flows.arrivals import ARRIVED, arrived_paths
from flows.parsing import parse_duration
from ptbin.errors import UsageError

MAX_BODY_NBYTES = 1 << 20
MAX_PATHS = 1_000
"""Of one event; more come in the next."""
MAX_PORT = 65_535


class Arrivals:
    """Paths that have come and have not been told yet."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._paths: dict[str, None] = {}

    def note(self, notification: Any) -> int:
        paths = arrived_paths(notification, self._source)
        with self._lock:
            self._paths.update(dict.fromkeys(paths))
        return len(paths)

    def tell(self) -> int:
        """Send an event with what has come; how many paths that were."""
        with self._lock:
            paths = list(self._paths)[:MAX_PATHS]
            for path in paths:
                del self._paths[path]
        if paths:
            resource = {
                "prefect.resource.id": f"ptbin.source.{self._source}",
                "prefect.resource.name": self._source,
            }
            emit_event(ARRIVED, resource=resource, payload={"source": self._source, "paths": paths})
        return len(paths)


def handler_of(arrivals: Arrivals, token: str | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            given = self.headers.get("Authorization", "")
            if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                self._answer(401)
                return
            try:
                length = int(self.headers.get("Content-Length", ""))
            except ValueError:
                length = -1
            if not 0 <= length <= MAX_BODY_NBYTES:
                self._answer(413)
                return
            try:
                notification = json.loads(self.rfile.read(length))
            except (ValueError, RecursionError):
                self._answer(400)
                return
            arrivals.note(notification)
            self._answer(204)

        def _answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    return Handler


def as_source(text: str) -> str:
    if "://" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a bucket or a prefix, such as s3://training/runs")
    return text.rstrip("/")


def as_address(text: str) -> tuple[str, int]:
    """Without a host it is this machine alone that is heard."""
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdecimal() or int(port) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8765")
    return host or "127.0.0.1", int(port)


def as_seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=as_source, help="the SOURCE of convert-arrivals, s3://bucket/prefix")
    parser.add_argument("--listen", type=as_address, default="127.0.0.1:8765", metavar="HOST:PORT")
    parser.add_argument("--every", type=as_seconds, default="5s", metavar="DURATION", help="gather that long")
    parser.add_argument(
        "--token-variable", metavar="NAME", help="a variable that holds the token of requests"
    )
    arguments = parser.parse_args()
    token = os.environ.get(arguments.token_variable, "") if arguments.token_variable else None
    if token == "":
        parser.error(f"--token-variable: {arguments.token_variable} is not set in the environment, or empty")
    host, port = arguments.listen
    arrivals = Arrivals(arguments.source)
    try:
        server = ThreadingHTTPServer((host, port), handler_of(arrivals, token))
    except OSError as error:
        parser.error(f"cannot listen on {host}:{port}: {error.strerror}")
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # so that a service that is stopped tells the rest
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"listening on {host}:{server.server_address[1]}", flush=True)
    try:
        while True:
            time.sleep(arguments.every)
            if count := arrivals.tell():
                print(f"{count} arrived", flush=True)
    except KeyboardInterrupt:
        arrivals.tell()
    return 0


if __name__ == "__main__":
    sys.exit(main())
