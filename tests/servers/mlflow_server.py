"""Real MLflow servers on loopback, over SQLite, and the scripts that fill and use them as other people would.

The scripts run as processes of their own: MLflow's client is not for the suite's strict warnings. The
server's runners of jobs are switched off: eight processes that import all of MLflow. To start it costs 6 s of
a core instead of 14, and 4.5 over a copied database.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.warm_python import stand_in

__all__ = ["MlflowServer", "copy_empty", "run_mlflow", "run_script"]

SCRIPTS = Path(__file__).with_name("mlflow_scripts")
START_SECONDS = 240


@dataclass
class MlflowServer:
    """A server that runs; `environment` is what its clients need to reach its artifacts."""

    url: str
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """As `ptbin migrate` takes it."""
        return f"mlflow+{self.url}"

    def run(self, script: str, *words: str) -> Any:
        """What a script of `mlflow_scripts` prints, which is JSON, run against this server."""
        return run_script(script, self.url, *words, environment=self.environment)


def run_script(script: str, *words: str, environment: Mapping[str, str]) -> Any:
    done = subprocess.run(
        [stand_in(), str(SCRIPTS / f"{script}.py"), *words],
        # -P, where the suite runs with it, would hide the scripts from one another.
        env=_quiet(environment) | {"PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def copy_empty(source: Path, dest: Path) -> None:
    """The database of a server that has just made it, as `run_mlflow` takes it: migrated and empty.

    The first experiment goes: it says where that server's artifacts are, and the next makes its own.
    """
    with (
        contextlib.closing(sqlite3.connect(source)) as made,
        contextlib.closing(sqlite3.connect(dest)) as copy,
    ):
        made.backup(copy)
        copy.execute("DELETE FROM experiments")
        copy.commit()


@contextlib.contextmanager
def run_mlflow(
    folder: Path,
    artifacts: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    *,
    database: Path | None = None,
) -> Iterator[MlflowServer]:
    """A server over `folder/mlflow.db`.

    Args:
        database: what `mlflow.db` is copied from (`copy_empty`), which saves the migrations; None: it makes
            one.
        artifacts: options of `mlflow server` that say where artifacts go; none: below `folder`, by way of the
            server.
        environment: for the server and its clients.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if database is not None:
        shutil.copyfile(database, folder / "mlflow.db")
    more = dict(environment or {})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(stand_in(), "-m", "mlflow", "server", "--workers", "1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *(artifacts or ("--artifacts-destination", str(folder / "artifacts"))),
    ]
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=_quiet(more), stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait(url, process, folder / "server.log")
            yield MlflowServer(url, folder, more)
        finally:
            # It has children of its own; the group is only theirs and its.
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 - http
            return
        time.sleep(0.2)
    raise AssertionError(f"no MLflow server within {START_SECONDS} s: {log.read_text()[-3000:]}")


def _quiet(more: Mapping[str, str]) -> dict[str, str]:
    return {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        **more,
    }
