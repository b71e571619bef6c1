"""Servers on loopback, by HTTP and by SMTP, that stand for whoever is told."""

from __future__ import annotations

import email
import email.policy
import json
import socketserver
import threading
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

__all__ = ["MailServer", "Mailbox"]


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


class MailServer:
    """A mail server that takes every message (RFC 5321, as much of it as `smtplib` speaks)."""

    def __init__(self) -> None:
        self.letters: list[EmailMessage] = []
        letters = self.letters

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.reply("220 loopback")
                while line := self.rfile.readline():
                    command = line.split(b" ")[0].strip().upper()
                    if command == b"DATA":
                        self.reply("354 go on")
                        letters.append(self.read_letter())
                    self.reply("221 bye" if command == b"QUIT" else "250 ok")
                    if command == b"QUIT":
                        return

            def read_letter(self) -> EmailMessage:
                lines = []
                while (line := self.rfile.readline()) != b".\r\n":
                    lines.append(line[1:] if line.startswith(b"..") else line)
                return email.message_from_bytes(b"".join(lines), policy=email.policy.default)

            def reply(self, text: str) -> None:
                self.wfile.write(f"{text}\r\n".encode())

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
