"""Where a run's history is kept: the server that the settings name, or an embedded one that lives as long.

With a `PREFECT_API_URL` (environment, profile, `prefect.toml`) that server is used and nothing is
started. Without one, a server is started as a child on a free local port, over the database in
`PREFECT_HOME`; `prefect server start` shows its runs later. Whatever the user has set wins over the
defaults chosen here.

Prefect 3.8.8 sends task-run states as events and its temporary server is stopped while they are still
under way, which loses most of them (`SubprocessASGIServer.stop`, `TaskRunRecorder`). So the embedded
server is stopped only after the client's queues are empty and the server has recorded as many final
task runs as were submitted; the wait is bounded, and its outcome is returned, not hidden.

A server may be gone before its run has ended. The client would try for a minute at each of the requests with
which a run ends, deaf to Ctrl-C; `await_server` waits once, and then has the rest fail at once.

Costs: about 10 s to start a server with an existing home, 15-20 s with a fresh one, 250 MB.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ptbin.errors import PtbinError

__all__ = [
    "ABSENT_SECONDS",
    "Orchestrator",
    "OrchestratorError",
    "await_server",
    "import_prefect",
    "is_embedded",
    "orchestrator",
]

TIMEOUT_SETTING = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
STARTUP_SECONDS = 90.0
RECORDING_SECONDS = 60.0
INTERRUPTED_SECONDS = 1.5
"""The recorder writes at least once a second."""
DRAIN_SECONDS = 20.0
STOP_SECONDS = 15.0
HEALTH_SECONDS = 3.0
ABSENT_SECONDS = 60.0
"""So long a server may be away, restarting, when a run wants to tell how it ended."""

# Set before Prefect is imported, where the user has not set them. Only the console is silenced: the
# INFO lines of a run still go to the server, where its page shows them.
CLIENT_DEFAULTS = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # Its own handler: without a server, a line of some kB for every event that could not be sent.
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
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
}


_embedded = False
"""Whether this process's flows run on the server that it started itself."""


class OrchestratorError(PtbinError):
    """Prefect's server could not be started or reached; nothing was converted."""

    reason = "orchestrator_unavailable"


@dataclass
class Orchestrator:
    """A server that runs can be recorded on."""

    api_url: str
    embedded: bool
    headers: dict[str, str] = field(default_factory=dict)

    def settle(self, flow_run_id: str | None, task_runs: int | None) -> bool:
        """Send what is queued here; on an embedded server also wait until the task runs are recorded.

        `task_runs` is how many the run submitted; None (it was interrupted) waits a moment for what comes.
        Returns whether the history is known to be complete: always True for a server that lives on,
        because it receives the rest by itself.
        """
        if not server_answers():
            return False
        _drain_client_queues()
        if not self.embedded or flow_run_id is None:
            return True
        began = time.monotonic()
        seconds = INTERRUPTED_SECONDS if task_runs is None else RECORDING_SECONDS
        while time.monotonic() < began + seconds:
            if task_runs is not None and self._recorded(flow_run_id) >= task_runs:
                return True
            time.sleep(0.1)
        return False

    def _recorded(self, flow_run_id: str) -> int:
        final = ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]
        question = {
            "flow_runs": {"id": {"any_": [flow_run_id]}},
            "task_runs": {"state": {"type": {"any_": final}}},
        }
        try:
            return int(_post_json(f"{self.api_url}/task_runs/count", question))
        except (OSError, ValueError):
            return -1


def is_embedded() -> bool:
    """Whether this process's flows run on a server that it started itself, and that ends with it."""
    return _embedded


def import_prefect() -> None:
    """Import Prefect with the settings that it reads then. An interrupt must not come into it.

    It takes a second of making pydantic's classes, and Prefect logs what its plugins' set-up comes to there,
    an interrupt too, and goes on.
    """
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import prefect.settings  # noqa: F401 - for what it does


@contextlib.contextmanager
def orchestrator() -> Iterator[Orchestrator]:
    """The server to run on; an embedded one lives as long as the context.

    Raises:
        OrchestratorError: no server could be started, with the last thing it said.
    """
    import_prefect()
    from prefect.settings import get_current_settings

    chosen = get_current_settings().to_environment_variables(exclude_unset=True)
    if api_url := chosen.get("PREFECT_API_URL"):
        yield Orchestrator(api_url, embedded=False)
        return
    with _embedded_server(chosen) as url, _use_api(url):
        yield Orchestrator(url, embedded=True)


def server_answers() -> bool:
    """Whether anything answers for the API just now; it need not be content with the question."""
    from httpx import HTTPStatusError
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True, httpx_settings={"timeout": HEALTH_SECONDS}) as client,
    ):
        error = client.api_healthcheck()
    return error is None or isinstance(error, HTTPStatusError)


def await_server(check: Callable[[], object], seconds: float = ABSENT_SECONDS) -> bool:
    """Whether the run can tell the server how it ended; one that is away is waited for.

    Where it stays away, whatever this thread still asks of it, Prefect's own last requests above all, fails
    at once instead of after minutes. An interrupt that `check` raises ends the wait and is raised.
    """
    if _embedded:
        seconds = 0.0  # a child of this process: nobody will start it again
    deadline = time.monotonic() + seconds
    try:
        while not (there := server_answers()) and time.monotonic() < deadline:
            check()
            time.sleep(0.5)
    except BaseException:
        _expect_no_server()
        raise
    if not there:
        _expect_no_server()
    return there


def _expect_no_server() -> None:
    from prefect.context import SettingsContext, get_settings_context
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, PREFECT_LOGGING_TO_API_ENABLED

    now = get_settings_context()
    settings = now.settings.copy_with_update(
        {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_LOGGING_TO_API_ENABLED: False}
    )
    # Never left: what is to fail at once comes after the flow's own code, in this thread's context.
    SettingsContext(profile=now.profile, settings=settings).__enter__()
    # What is queued would hold up the end of the process: 7 s for each of hundreds of events, a minute for
    # logs. Prefect offers no way to drop it; a service is done when its task is cancelled
    # (`_QueueServiceBase._run`).
    for worker in _client_workers():
        for service in list(worker._instances.values()):  # noqa: SLF001
            if service._task is not None:  # noqa: SLF001
                service._loop.call_soon_threadsafe(service._task.cancel)  # noqa: SLF001


def _client_workers() -> tuple[Any, ...]:
    """Prefect's event and log threads, by class."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    return EventsWorker, APILogWorker


@contextlib.contextmanager
def _embedded_server(chosen: dict[str, str]) -> Iterator[str]:
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
            env=_server_environment(chosen) | {"PREFECT_HOME": str(home.absolute())},
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
            _wait_until_healthy(child, url, log, float(chosen.get(TIMEOUT_SETTING, STARTUP_SECONDS)))
            yield url
        finally:
            _stop(child)


def _server_environment(chosen: dict[str, str]) -> dict[str, str]:
    # The markers are those of Prefect's own `SubprocessASGIServer`: only the services that a run
    # needs are started, and no scheduler.
    return {
        **SERVER_DEFAULTS,
        **os.environ,
        **chosen,
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }


def _wait_until_healthy(child: subprocess.Popen[bytes], url: str, log: IO[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise OrchestratorError(
                f"Prefect's embedded server ended with status {child.returncode} while starting: "
                + _last_words(log)
            )
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


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


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


@contextlib.contextmanager
def _use_api(url: str) -> Iterator[None]:
    """Make the server the one that every thread of this process talks to."""
    from prefect.context import refresh_global_settings_context

    global _embedded  # noqa: PLW0603 - as the environment is
    # The environment, not `temporary_settings`: Prefect's own threads start outside our context.
    os.environ["PREFECT_API_URL"] = url
    _embedded = True
    refresh_global_settings_context()
    try:
        with _without_heartbeat():
            yield
    finally:
        if server_answers():
            _drain_client_queues()
        _embedded = False
        del os.environ["PREFECT_API_URL"]
        refresh_global_settings_context()


@contextlib.contextmanager
def _without_heartbeat() -> Iterator[None]:
    """Nothing watches for heartbeats on a server that ends with its run, and their thread costs a second."""
    from prefect.settings import get_current_settings, temporary_settings

    if "heartbeat_frequency" in get_current_settings().flows.model_fields_set:
        yield
        return
    with temporary_settings({"flows.heartbeat_frequency": None}):
        yield


def _drain_client_queues() -> None:
    """Have Prefect's event and log threads send what they hold; they start anew when needed."""
    for worker in _client_workers():
        with contextlib.suppress(Exception):
            worker.drain_all(timeout=DRAIN_SECONDS, at_exit=False)


def _post_json(url: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(  # noqa: S310 - our own http URL
        url, json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return json.load(answer)
