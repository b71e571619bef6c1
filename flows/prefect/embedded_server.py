"""The Prefect server of one run, as a child process: serve on an inherited socket until the parent is gone.

Run as a script by `flows.prefect.orchestrator`, never imported by it. Two things differ from Prefect's own
temporary server (`prefect.server.api.server.SubprocessASGIServer`, 3.8.8): the socket is bound by the
parent, so no port can be lost between choosing and binding it; and the end of standard input means
that the parent is gone, however it went, so a killed run leaves no server behind. Either end is a
graceful one: the services write what they still hold.

Servers that start at the same time bring one database up to date one after the other: its migrations do not
stand each other (`alembic_upgrade`). What keeps a server from starting goes to standard error.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn


def serve(listening_fd: int) -> None:
    """Serve Prefect's API on the socket until standard input ends or SIGTERM comes."""
    from prefect.server.api.server import create_app  # seconds, which need not be waited for in turn

    def make_app() -> Any:
        app = create_app()
        # Prefect has set up logging by now: what keeps the server from starting would be reported nowhere.
        logger = logging.getLogger("uvicorn.error")
        logger.setLevel(logging.ERROR)
        logger.addHandler(logging.StreamHandler())
        return app

    config = uvicorn.Config(make_app, factory=True, lifespan="on", log_level="critical")
    server = uvicorn.Server(config)

    def watch_parent() -> None:
        # Not by `sys.stdin`: a thread that waits there holds its lock, and the interpreter aborts at its end.
        while os.read(0, 4096):
            pass
        server.should_exit = True

    threading.Thread(target=watch_parent, daemon=True).start()
    with _in_turn(server):
        server.run(sockets=[socket.socket(fileno=listening_fd)])


@contextlib.contextmanager
def _in_turn(server: uvicorn.Server) -> Iterator[None]:
    """Hold the home's lock until the server is up, or the process ends."""
    with open(os.path.join(os.environ["PREFECT_HOME"], "ptbin-server.lock"), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def release() -> None:
            while not server.started:
                time.sleep(0.05)
            # What was imported stays: collections would walk a million objects of it.
            gc.freeze()
            gc.enable()
            fcntl.flock(file, fcntl.LOCK_UN)

        threading.Thread(target=release, daemon=True).start()
        yield


if __name__ == "__main__":
    gc.disable()  # until it is up: half a second of the start, of which little would be garbage
    serve(int(sys.argv[1]))
    os._exit(0)  # everything is written; to take the modules down one by one is 0.2 s more
