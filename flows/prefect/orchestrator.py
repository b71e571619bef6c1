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
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.prefect.child import OrchestratorError, embedded_server
from flows.prefect.early import begin_early, take_early
from flows.prefect.undocumented import drain_client_queues, expect_no_server, refresh_settings, settings_with
from ptbin.stores import public_uri

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

RECORDING_SECONDS = 60.0
INTERRUPTED_SECONDS = 1.5
"""The recorder writes at least once a second."""
DRAIN_SECONDS = 20.0
HEALTH_SECONDS = 3.0
NOT_THERE = 404
KEY_REFUSED = (401, 403)
AWAY_SECONDS = 5.0
"""How long a server may be away when a run begins."""
ABSENT_SECONDS = 60.0
"""How long a server may be away, restarting, when a run reports its end."""

# Set before Prefect is imported, where the user has not set them. Only the console is silenced: the
# INFO lines of a run still go to the server, where its page shows them.
CLIENT_DEFAULTS = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # Its own handler: without a server, a line of some kB for every event that could not be sent.
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}

_embedded = False
"""Whether this process's flows run on the server that it started itself."""


@dataclass
class Orchestrator:
    """A server that runs can be recorded on."""

    api_url: str
    embedded: bool

    def settle(self, flow_run_id: str | None, task_runs: int | None) -> bool:
        """Send what is queued here; on an embedded server also wait until the task runs are recorded.

        `task_runs` is how many the run submitted; None (it was interrupted) waits a moment for what comes.
        Returns whether the history is known to be complete: always True for a server that lives on,
        because it receives the rest by itself.
        """
        if not server_answers():
            return False
        drain_client_queues(DRAIN_SECONDS)
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

    It makes pydantic's classes for a second, and Prefect logs whatever its plugins' set-up raises there, an
    interrupt too, and goes on.
    """
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    # Where a server of its own needs the home, `embedded_server` refuses; a running one does not need it.
    warnings.filterwarnings("ignore", "Failed to create the Prefect home directory")
    import prefect.settings  # noqa: F401 - for what it does


@contextlib.contextmanager
def orchestrator() -> Iterator[Orchestrator]:
    """The server to run on; an embedded one lives as long as the context.

    Raises:
        OrchestratorError: no server could be started, with the last thing it said.
    """
    early = take_early()
    url, started = early.result() if early is not None else (None, contextlib.ExitStack())
    chosen = _chosen_settings()
    if api_url := chosen.get("PREFECT_API_URL"):
        _refuse_absent(api_url)
        yield Orchestrator(api_url, embedded=False)
        return
    with started as stack:
        url = url or stack.enter_context(embedded_server(chosen))
        with _use_api(url):
            yield Orchestrator(url, embedded=True)


def _refuse_absent(api_url: str) -> None:
    """Raises OrchestratorError where the server serves no run; it may be starting, so after some seconds."""
    shown = f"{public_uri(api_url)} (PREFECT_API_URL)"
    deadline = time.monotonic() + AWAY_SECONDS
    while (error := _health() or _refusal()) is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in KEY_REFUSED:
            raise OrchestratorError(
                f"Prefect's server at {shown} refuses the run ({status}): PREFECT_API_KEY, or "
                "PREFECT_API_AUTH_STRING of an own server, is missing, wrong or expired"
            )
        if status == NOT_THERE or isinstance(error, ValueError):
            raise OrchestratorError(
                f"what answers at {shown} is not Prefect's API, whose address ends in /api"
            )
        if isinstance(error, RuntimeError):  # of versions that do not fit
            raise OrchestratorError(f"Prefect's server at {shown}: {error}")
        if time.monotonic() > deadline:
            what = f"answers with status {status} at" if status else "does not answer at"
            raise OrchestratorError(
                f"Prefect's server {what} {shown}; start it, or unset PREFECT_API_URL to have one started "
                "for the run"
            )
        time.sleep(0.5)


def _refusal() -> Exception | None:
    """Ask the server what every run asks: health is answered without a key, and by other programs."""
    with _quick_client() as client:
        try:
            client.read_flows(limit=1)
            client.raise_for_api_version_mismatch()
        except Exception as error:  # noqa: BLE001 - httpx's, pydantic's, Prefect's
            return error
    return None


def start_early() -> None:
    """Begin to import Prefect and to start its server, in a thread; `orchestrator` goes on with it."""

    def start(stack: contextlib.ExitStack) -> str | None:
        chosen = _chosen_settings()
        if "PREFECT_API_URL" in chosen:
            return None
        return stack.enter_context(embedded_server(chosen))

    begin_early(start)


def _chosen_settings() -> dict[str, str]:
    """What the user has set, wherever that was."""
    import_prefect()
    from prefect.settings import get_current_settings

    return get_current_settings().to_environment_variables(exclude_unset=True)


def server_answers() -> bool:
    """Whether anything answers for the API just now; it need not be content with the question."""
    from httpx import HTTPStatusError

    error = _health()
    return error is None or isinstance(error, HTTPStatusError)


def _health() -> Exception | None:
    """Ask the server for its health; the error, or None where it is well."""
    with _quick_client() as client:
        return client.api_healthcheck()


@contextlib.contextmanager
def _quick_client() -> Iterator[SyncPrefectClient]:
    """A client that asks once, and waits for some seconds at most."""
    from prefect.client.orchestration import get_client

    with (
        settings_with("client", max_retries=0),
        get_client(sync_client=True, httpx_settings={"timeout": HEALTH_SECONDS}) as client,
    ):
        yield client


def await_server(check: Callable[[], object], seconds: float = ABSENT_SECONDS) -> bool:
    """Whether the run can report its end to the server; one that is away is waited for.

    Where it stays away, whatever this thread still asks of it, Prefect's own last requests above all, fails
    at once instead of after minutes. An interrupt that `check` raises ends the wait and is raised.
    """
    if is_embedded():
        seconds = 0.0  # a child of this process: nothing starts it again
    deadline = time.monotonic() + seconds
    try:
        while not (there := server_answers()) and time.monotonic() < deadline:
            check()
            time.sleep(0.5)
    except BaseException:
        expect_no_server()
        raise
    if not there:
        expect_no_server()
    return there


@contextlib.contextmanager
def _use_api(url: str) -> Iterator[None]:
    """Make the server the one that every thread of this process talks to."""
    global _embedded  # noqa: PLW0603 - as the environment is
    # The environment, not `temporary_settings`: Prefect's own threads start outside our context.
    os.environ["PREFECT_API_URL"] = url
    _embedded = True
    refresh_settings()
    try:
        with _without_heartbeat():
            yield
    finally:
        if server_answers():
            drain_client_queues(DRAIN_SECONDS)
        _embedded = False
        del os.environ["PREFECT_API_URL"]
        refresh_settings()


@contextlib.contextmanager
def _without_heartbeat() -> Iterator[None]:
    """Nothing watches for heartbeats on a server that ends with its run, and their thread costs a second."""
    from prefect.settings import get_current_settings

    if "heartbeat_frequency" in get_current_settings().flows.model_fields_set:
        yield
        return
    with settings_with("flows", heartbeat_frequency=None):
        yield


def _post_json(url: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(  # noqa: S310 - our own http URL
        url, json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return json.load(answer)
