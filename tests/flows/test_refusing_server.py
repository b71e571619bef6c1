"""A Prefect server that does not serve a run: said before the run begins, in a line that helps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.prefect import orchestrator as module
from flows.prefect.child import OrchestratorError
from flows.prefect.orchestrator import Orchestrator, orchestrator


@contextmanager
def answering(status: int, body: bytes, *, well: bool) -> Iterator[str]:
    """A server that answers everything alike; `well`: but for its health, which is asked without a key."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            healthy = well and self.path.endswith("/health")
            self.send_response(200 if healthy else status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"true" if healthy else body)

        do_POST = do_GET  # noqa: N815 - http.server's names

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/api"
        server.shutdown()


@pytest.mark.parametrize("well", [True, False])
@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b"{}", "PREFECT_API_KEY"),
        (403, b"{}", "PREFECT_API_KEY"),
        (404, b"{}", "is not Prefect's API"),
        (200, b"true", "is not Prefect's API"),
        (200, b"<html>hello</html>", "is not Prefect's API"),
        (429, b"{}", "status 429"),
        (500, b"{}", "status 500"),
        (503, b"", "status 503"),
    ],
)
def test_a_server_that_serves_no_run_is_named(
    status: int, body: bytes, said: str, *, well: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AWAY_SECONDS", 0.0)
    with (
        answering(status, body, well=well) as url,
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(OrchestratorError) as refused,
        orchestrator(),
    ):
        pass
    assert said in str(refused.value)
    assert url in str(refused.value)


def test_a_server_that_is_well_is_used(server: Orchestrator) -> None:
    with orchestrator() as found:
        assert found.api_url == server.api_url
