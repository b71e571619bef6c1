"""The Prefect server of one run, as a child process: serve on an inherited socket until the parent is gone.

Run as a script by `flows.prefect.orchestrator`, never imported by it. Two things differ from Prefect's own
temporary server (`prefect.server.api.server.SubprocessASGIServer`, 3.8.8): the socket is bound by the
parent, so no port can be lost between choosing and binding it; and the end of standard input means
that the parent is gone, however it went, so a killed run leaves no server behind. Either end is a
graceful one: the services write what they still hold.
"""

from __future__ import annotations

import socket
import sys
import threading

import uvicorn


def serve(listening_fd: int) -> None:
    """Serve Prefect's API on the socket until standard input ends or SIGTERM comes."""
    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, lifespan="on", log_level="critical"
    )
    server = uvicorn.Server(config)

    def watch_parent() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=watch_parent, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=listening_fd)])


if __name__ == "__main__":
    serve(int(sys.argv[1]))
