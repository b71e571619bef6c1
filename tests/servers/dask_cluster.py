"""A Dask cluster of separate processes on loopback: a scheduler and workers that a test may kill."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["DaskCluster", "dask_cluster"]

START_SECONDS = 200


class DaskCluster:
    """`address` for clients; the workers' processes in `workers`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "scheduler.json"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.address = ""

    def start(self, workers: int) -> None:
        # Without these it would listen on every interface.
        self._run("scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0",
                  "--scheduler-file", str(self._file))  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self.address:
            assert time.monotonic() < deadline, "the Dask scheduler does not start"
            with contextlib.suppress(OSError, ValueError):
                self.address = json.loads(self._file.read_text())["address"]
            time.sleep(0.05)
        for _ in range(workers):
            self.add_worker()
        from distributed import Client

        with Client(self.address, timeout=START_SECONDS, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=START_SECONDS)

    def add_worker(self) -> None:
        """One more, without a nanny that would start it anew after its death."""
        worker = self._run(
            "worker", self.address, "--no-nanny", "--nthreads", "1", "--host", "127.0.0.1", "--no-dashboard",
            "--local-directory", str(self._folder),
        )  # fmt: skip
        self.workers.append(worker)

    def _run(self, *words: str) -> subprocess.Popen[bytes]:
        log = (self._folder / f"dask-{len(self._processes)}.log").open("wb")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *words],
                cwd=self._folder,
                env=os.environ | {"PREFECT_LOGGING_LEVEL": "ERROR"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()


@contextlib.contextmanager
def dask_cluster(folder: Path, workers: int = 2) -> Iterator[DaskCluster]:
    """A running cluster while the context lasts."""
    cluster = DaskCluster(folder)
    try:
        cluster.start(workers)
        yield cluster
    finally:
        cluster.stop()
