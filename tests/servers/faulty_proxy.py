"""An HTTP proxy before a good S3 server that fails on schedule: what clouds do now and then, every time.

A schedule is a list of faults with conditions: each strikes once, at the first request that meets its
condition. So a test says "the second part's first attempt is answered 503", and counts what came.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Literal
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Fault", "FaultyProxy", "Request", "faulty_proxy"]

Kind = Literal["503", "500", "403", "reset", "short", "lost-answer"]

OPERATIONS = {
    ("GET", "list-type"): "list_objects_v2",
    ("GET", "uploads"): "list_multipart_uploads",
    ("GET", "uploadId"): "list_parts",
    ("POST", "uploads"): "create_multipart_upload",
    ("POST", "uploadId"): "complete_multipart_upload",
    ("POST", "delete"): "delete_objects",
    ("PUT", "partNumber"): "upload_part",
    ("DELETE", "uploadId"): "abort_multipart_upload",
}
"""By method and a name in the query (Amazon S3's API reference); all others: <method>_object or _bucket."""

BODIES = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "403": (403, "AccessDenied", "Access Denied"),
}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str
    if_match: str = ""
    copied_from: str = ""

    @property
    def operation(self) -> str:
        """What S3 calls it: the API's name of a request with this method and query."""
        place, _, query = self.path.partition("?")
        key = place.strip("/").partition("/")[2]
        asked = set(parse_qs(query, keep_blank_values=True))
        for (method, wanted), name in OPERATIONS.items():
            if method == self.method and wanted in asked:
                return f"{name}_copy" if self.copied_from and name == "upload_part" else name
        if self.method == "PUT" and self.copied_from:
            return "copy_object"
        return f"{self.method.lower()}_{'object' if key else 'bucket'}"


@dataclass(frozen=True)
class Fault:
    kind: Kind
    meets: Callable[[Request], bool] = lambda request: True


@dataclass
class FaultyProxy:
    """`url` to talk to, `requests` that came, `faults` still to strike."""

    url: str
    target: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, method: str, text: str = "") -> int:
        return sum(request.method == method and text in request.path for request in self.requests)

    def operations(self, text: str = "") -> Counter[str]:
        """The requests that came so far, by what S3 calls them, with this text in the path."""
        return Counter(request.operation for request in self.requests if text in request.path)

    def strikes(self, request: Request) -> Kind | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.meets(request):
                    self.faults.remove(fault)
                    return fault.kind
            return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the answer to its headers
    proxy: FaultyProxy

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        headers = (self.headers.get(name, "") for name in ("Range", "If-Match", "x-amz-copy-source"))
        kind = self.proxy.strikes(Request(self.command, self.path, *headers))
        if kind == "reset":
            self._reset()
        elif kind in BODIES:
            status, code, message = BODIES[kind]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
            self._answer(status, [("Content-Type", "application/xml")], text.encode())
        else:
            self._forward(body, kind)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 - http.server's names

    def _forward(self, body: bytes, kind: Kind | None) -> None:
        connection = http.client.HTTPConnection(urlsplit(self.proxy.target).netloc, timeout=30)
        with contextlib.closing(connection):
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        if kind == "lost-answer":
            self._reset()
            return
        dropped = {"connection", "transfer-encoding", "content-length", "server", "date"}
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in dropped]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(answer.status, kept, content, length=length, cut=kind == "short")

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        *,
        length: str | None = None,
        cut: bool = False,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if cut:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        # SO_LINGER of zero seconds: closing sends RST instead of FIN (man 7 socket).
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Tests look at `requests` instead."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Clients that cancel cut their connections; nobody wants the traceback."""


@contextlib.contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    """A proxy to the server at `target`, until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    proxy = FaultyProxy(f"http://127.0.0.1:{server.server_address[1]}", target)
    handler.proxy = proxy  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
