"""Prefect as an operator runs it, on loopback: a server on PostgreSQL (or SQLite), work pools, workers.

Everything is a process of its own, started here, killed by its process id, and keeps its files in one folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.warm_forks import parent_of
from tests.warm_python import stand_in

__all__ = ["FINAL", "PrefectStack", "descendants", "postgres_programs", "prefect_stack", "wait_for"]

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 240
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs; Debian does not put them on PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    program = shutil.which("initdb")
    return Path(program).resolve().parent if program else None


def wait_for(condition: Callable[[], Any], seconds: float = 60, what: str = "it") -> Any:
    """What the condition comes to, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come to pass within {seconds:.0f} s")
        time.sleep(0.25)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have: a flow run has a group of its own."""
    children: dict[int, list[int]] = {}
    for one in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            children.setdefault(parent_of(one), []).append(one)
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


class PrefectStack:
    """Start what is needed, in any order that makes sense; `stop` ends it all."""

    def __init__(self, folder: Path, data: Path | None = None) -> None:
        self.folder = folder
        data = data or folder
        self.port = free_port()
        self.api_url = f"http://127.0.0.1:{self.port}/api"
        self.ui_url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")
        } | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_SERVER_UI_API_URL": self.api_url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
            # Else the server imports and registers every collection of blocks that is installed: seconds.
            "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
            "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
            # In memory they would be gone with a killed server, and the slots that they hold taken for ever.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "DO_NOT_TRACK": "1",
            "PTBIN_WORKDIR": str(folder),
            "PTBIN_SOURCE": str(data / "source"),
            "PTBIN_DEST": str(data / "dest"),
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        self.server: subprocess.Popen[bytes] | None = None

    # -- processes -------------------------------------------------------------------------------

    def start_process(self, name: str, words: list[str], **environment: str) -> subprocess.Popen[bytes]:
        """A process in a group of its own, its output in `<name>.log`."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                words,
                cwd=self.folder,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def start_database(self) -> None:
        """PostgreSQL, over files in the folder. It refuses to run as root: then as the user postgres."""
        programs = postgres_programs()
        assert programs is not None
        data, user = self.folder / "database", []
        data.mkdir(parents=True)
        if os.geteuid() == 0:
            user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            owner = pwd.getpwnam("postgres")
            os.chown(data, owner.pw_uid, owner.pw_gid)
            for parent in (self.folder, *self.folder.parents):
                with contextlib.suppress(OSError):
                    parent.chmod(parent.stat().st_mode | 0o011)
        make = [*user, str(programs / "initdb"), "-D", str(data), "-U", "prefect", "-A", "trust", "-N"]
        subprocess.run(make, check=True, capture_output=True, cwd="/")
        port = free_port()
        self.start_process(
            "postgres",
            [*user, str(programs / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1",
             "-c", f"unix_socket_directories={data}", "-c", "fsync=off"],
        )  # fmt: skip
        url = f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
        self.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = url

        def answers() -> bool:
            asked = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-q"]
            return subprocess.run(asked, cwd="/").returncode == 0

        wait_for(answers, START_SECONDS, "PostgreSQL's start")

    def start_server(self) -> None:
        """The API, the UI and the background services, which read their settings when they are imported."""
        words = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.server = self.start_process("server", [sys.executable, *words])

        def answers() -> bool:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.api_url}/health", timeout=5) as answer,  # noqa: S310 - our own
            ):
                return bool(answer.status == 200)
            return False

        wait_for(answers, START_SECONDS, "the server's start")

    def start_worker(self, name: str = "worker", pool: str = "ptbin-process") -> subprocess.Popen[bytes]:
        """A worker, as the processes that an operator has: what it starts are its children."""
        words = ["-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--type", "process"]
        return self.start_process(name, [sys.executable, *words])

    def running_in(self, worker: subprocess.Popen[bytes]) -> list[int]:
        """Process ids of what a worker has started, itself left out."""
        return descendants(worker.pid)

    @staticmethod
    def kill(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
        """A signal to a process and all that it has started, and wait for its end."""
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        process.wait(60)

    def stop(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                number = signal.SIGINT if "postgres" in " ".join(map(str, process.args)) else signal.SIGKILL  # type: ignore[arg-type]
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    self.kill(process, number)

    # -- commands --------------------------------------------------------------------------------

    def prefect(self, *words: str) -> str:
        """A command of Prefect's, as an operator types it; its output."""
        done = subprocess.run(
            [stand_in("prefect"), "--no-prompt", *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode:
            raise RuntimeError(f"prefect {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def deploy(self) -> None:
        """The work pools and all deployments, as README.md of deployments/ says.

        The first pool by the command that stands there; the others are asked of the server, as it would: a
        command costs three seconds of a core.
        """
        folder = ROOT / "deployments" / "work-pools"
        create = ("work-pool", "create", "ptbin-process", "--type", "process")
        self.prefect(*create, "--base-job-template", str(folder / "process.json"))
        for kind in ("docker", "kubernetes"):
            template = json.loads((folder / f"{kind}.json").read_text())
            pool = {"name": f"ptbin-{kind}", "type": kind, "base_job_template": template}
            self.ask("/work_pools/", pool)
        self.prefect("deploy", "--prefect-file", "deployments/prefect.yaml", "--all")

    def ask(self, path: str, question: Any = None, method: str = "POST") -> Any:
        """A question to the API."""
        data = json.dumps({} if question is None else question).encode() if method != "GET" else None
        request = urllib.request.Request(  # noqa: S310 - our own server
            f"{self.api_url}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
            text = answer.read()
        return json.loads(text) if text else None

    def run(self, deployment: str, **parameters: Any) -> str:
        """Trigger a run; its id."""
        found = self.ask(f"/deployments/name/{deployment}", method="GET")
        made = self.ask(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})
        return str(made["id"])

    def runs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("/flow_runs/filter", {"sort": "START_TIME_ASC"})
        return found

    def state(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"/flow_runs/{run_id}", method="GET")["state"]
        return found

    def wait_for_end(self, run_id: str, seconds: float = 120) -> dict[str, Any]:
        """The final state of a run."""
        found: dict[str, Any] = wait_for(
            lambda: (s := self.state(run_id))["type"] in FINAL and s, seconds, f"the end of run {run_id}"
        )
        return found

    def artifacts(self, run_id: str) -> dict[str, str]:
        """Key and type of a run's artifacts."""
        question = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
        return {item["key"]: item["type"] for item in self.ask("/artifacts/filter", question)}


@contextlib.contextmanager
def prefect_stack(folder: Path, *, postgres: bool, data: Path | None = None) -> Iterator[PrefectStack]:
    """A server with the deployments of this project, without a worker yet; they work in `data`."""
    folder.mkdir(parents=True, exist_ok=True)
    stack = PrefectStack(folder, data)
    try:
        if postgres:
            stack.start_database()
        stack.start_server()
        stack.deploy()
        yield stack
    finally:
        stack.stop()
