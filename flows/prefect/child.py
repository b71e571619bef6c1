"""The embedded server as a child process of a run: started, waited for, ended.

Costs: about 10 s to start a server with an existing home, 15-20 s with a fresh one, 250 MB. Several may start
at the same time over one home (`embedded_server`).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flows.prefect.undocumented import EPHEMERAL_SERVER
from ptbin.errors import PtbinError

__all__ = ["OrchestratorError", "embedded_server"]

TIMEOUT_SETTING = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
STARTUP_SECONDS = 90.0
STOP_SECONDS = 15.0
DATABASE_FAULTS = ("sqlite3.", "sqlalchemy.", "alembic.")
"""Where the errors come from that a broken `prefect.db` gives."""
_ERROR_LINE = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception)\b.*: ")

# The recorder takes one event at a time by default; batches cost a third of the server's time.
# What does not fill a batch waits for the flush: after 5 s by default, and 1 is the least there is, because
# the recorder rounds down and 0 is a busy loop (`prefect.server.services.task_run_recorder`).
SERVER_DEFAULTS = {
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    # It imports every collection of blocks that is installed (prefect-aws, prefect-gcp: a second) in order to
    # note that they are registered, which they are not.
    "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
}


class OrchestratorError(PtbinError):
    """Prefect's server could not be started or reached; nothing was converted."""

    reason = "orchestrator_unavailable"


@contextlib.contextmanager
def embedded_server(chosen: dict[str, str]) -> Iterator[str]:
    """Start the child, wait until it is healthy, stop it gracefully at the end."""
    home = Path(chosen.get("PREFECT_HOME", "~/.prefect")).expanduser()
    if not os.access(home, os.W_OK):  # importing Prefect has tried to create it
        raise OrchestratorError(
            f"Prefect's home cannot be written, {home}: set PREFECT_HOME to a directory that can, "
            "or PREFECT_API_URL to a running server"
        )
    with (
        # Its migrations import from the working folder too (`prepend_sys_path` of Prefect's alembic.ini).
        tempfile.TemporaryDirectory(prefix="ptbin-") as empty,
        tempfile.TemporaryFile() as log,
        socket.create_server(("127.0.0.1", 0), backlog=512) as listener,
    ):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        child = subprocess.Popen(
            # -P: the script's own folder must not become a place to import from.
            [
                sys.executable,
                "-P",
                str(Path(__file__).with_name("embedded_server.py")),
                str(listener.fileno()),
            ],
            env={
                **SERVER_DEFAULTS,
                **os.environ,
                **chosen,
                **EPHEMERAL_SERVER,
                "PREFECT_HOME": str(home.absolute()),
            },
            cwd=empty,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            # Ctrl-C reaches the foreground group: the server has to outlive it to record the crash.
            start_new_session=True,
        )
        try:
            listener.close()
            _wait_until_healthy(child, url, log, home, float(chosen.get(TIMEOUT_SETTING, STARTUP_SECONDS)))
            yield url
        finally:
            _stop(child)


def _wait_until_healthy(
    child: subprocess.Popen[bytes], url: str, log: IO[bytes], home: Path, seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise OrchestratorError(_why_it_ended(_last_words(log), child.returncode, home))
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:  # noqa: S310 - our own http URL
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise OrchestratorError(
        f"Prefect's embedded server did not answer within {seconds:.0f} s "
        f"({TIMEOUT_SETTING}): {_last_words(log)}"
    )


def _why_it_ended(words: str, status: int, home: Path) -> str:
    """One line: the server's last words, and what to do where its database is at fault."""
    text = f"Prefect's embedded server ended with status {status} while starting: {words}"
    if any(name in words for name in DATABASE_FAULTS):
        text += (
            f"; its database is {home}/prefect.db: move it away to begin a new one (the history of runs that "
            "Prefect keeps is lost, ptbin's own lies in DEST), or set PREFECT_HOME to another directory"
        )
    return text


def _last_words(log: IO[bytes]) -> str:
    """The last line that names an error, else the last one."""
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    return (errors or lines)[-1].strip() if lines else "it printed nothing"


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
