"""An HTTP server on loopback that stands for whoever is told."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

__all__ = ["Mailbox"]


class Mailbox:
    """An HTTP server that notes what it is sent, by the path it is sent to."""

    def __init__(self) -> None:
        self.letters: list[tuple[str, dict[str, Any]]] = []
        letters = self.letters

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                letters.append((self.path, json.loads(body)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def at(self, path: str) -> list[dict[str, Any]]:
        return [letter for where, letter in self.letters if where == path]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
