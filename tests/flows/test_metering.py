"""Metrics of runs: to a file, a Pushgateway, OpenTelemetry; board and rules ask for what there is."""

from __future__ import annotations

import base64
import json
import logging
import re
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flows import metering
from flows.cli.app import run as cli
from flows.convert import convert
from flows.metric_targets import parse_targets
from ptbin.errors import UsageError
from ptbin.history.metrics import MEANINGS
from ptbin.history.openmetrics import Family
from ptbin.runs.outcomes import Outcome
from tasks.live import Listener, LiveRun
from tests.servers.prometheus import MONITORING, prometheus_program


class Gateway:
    """Notes what is put or posted, by path."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        self.status = 200
        self.authorization: str | None = None
        bodies = self.bodies
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                gateway.authorization = self.headers["Authorization"]
                bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(gateway.status)
                self.end_headers()

            do_POST = do_PUT  # noqa: N815 - http.server's names

            def log_message(self, *arguments: Any) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.server.shutdown()
    gateway.server.server_close()


def values(text: str) -> dict[tuple[str, str], float]:
    """By name and outcome, as Prometheus's own parser reads them."""
    return {
        (sample.name, sample.labels.get("outcome", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.usefixtures("server")
def test_a_run_tells_how_far_it_is_and_that_it_has_ended(
    source: Path, tmp_path: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "SEND_SECONDS", 0.05)
    file = tmp_path / "run.prom"
    monkeypatch.setenv("PTBIN_METRICS", f"textfile:{file} pushgateway:{gateway.url}")
    dest = tmp_path / "out"
    assert convert(str(source), str(dest), return_state=True).is_failed()
    path, first = gateway.bodies[0]
    assert path.startswith("/metrics/job/ptbin/dest@base64/")
    assert base64.urlsafe_b64decode(path.split("/")[5]).decode() == str(dest)
    assert values(first.decode())["ptbin_run_active", ""] == 1
    last = values(file.read_text())
    assert values(gateway.bodies[-1][1].decode()).keys() == last.keys()
    assert last["ptbin_run_active", ""] == 0
    assert last["ptbin_run_checkpoints", "converted"] == 12
    assert last["ptbin_run_checkpoints", "rejected"] >= 1
    assert last["ptbin_run_planned_checkpoints", ""] >= 12
    for name in ("ptbin_run_moved_bytes", "ptbin_run_read_bytes", "ptbin_run_written_bytes"):
        assert last[name, ""] > 0


@pytest.mark.usefixtures("server")
def test_a_gateway_that_is_gone_is_no_matter(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PTBIN_METRICS", "pushgateway:http://127.0.0.1:9")
    state = convert(str(good_source), str(tmp_path / "out"), return_state=True)
    assert state.is_completed()
    assert sum("metrics: " in record.getMessage() for record in caplog.records) == 1


class Answers(socketserver.StreamRequestHandler):
    """Answers whatever is asked with the server's `words`, and hangs up."""

    def handle(self) -> None:
        self.rfile.read1()
        self.wfile.write(self.server.words)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "words",
    [b"", b"\x1b[31mgarbage\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n", b"HTTP/1.1 302 No\r\nLocation: /\r\n\r\n"],
)
def test_an_answer_of_any_kind_is_one_warning_and_keeps_nothing_from_other_targets(
    words: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metering, "SEND_SECONDS", 0.05)
    monkeypatch.setattr("prefect.logging.get_run_logger", lambda: logging.getLogger("run"))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answers) as server:
        server.words = words  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        gateway = f"127.0.0.1:{server.server_address[1]}"
        url = f"http://user:hunter2@{gateway}"
        monkeypatch.setenv("PTBIN_METRICS", f"pushgateway:{url} textfile:{tmp_path / 'run.prom'}")
        live = LiveRun("run")
        with metering.metering(live):
            live.listener.moved(5)
            time.sleep(0.3)
        server.shutdown()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert gateway in told[0]
    assert "hunter2" not in told[0]
    last = values((tmp_path / "run.prom").read_text())
    assert (last["ptbin_run_active", ""], last["ptbin_run_moved_bytes", ""]) == (0, 5)


def test_a_gateway_that_hangs_keeps_nothing_from_other_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "SEND_SECONDS", 0.2)
    monkeypatch.setattr("prefect.logging.get_run_logger", lambda: logging.getLogger("run"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("PTBIN_METRICS", f"pushgateway:{url} textfile:{tmp_path / 'run.prom'}")
        with metering.metering(LiveRun("run")):
            pass
    assert values((tmp_path / "run.prom").read_text())["ptbin_run_active", ""] == 0


def test_a_password_for_a_gateway_is_sent_as_a_header(gateway: Gateway) -> None:
    (target,) = parse_targets(f"pushgateway:{gateway.url.replace('//', '//me:p%40ss@')}", {})
    target.send([])
    assert gateway.authorization == f"Basic {base64.b64encode(b'me:p@ss').decode()}"


def test_a_collector_of_opentelemetry_gets_the_same_numbers(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    import gzip

    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", gateway.url)
    (target,) = parse_targets("otlp", {})
    family = Family("checkpoints", "By outcome.")
    family.add({"dest": "/out"}, 3, outcome="converted")
    target.send([family])
    path, body = gateway.bodies[-1]
    assert path == "/v1/metrics"
    request = ExportMetricsServiceRequest()
    request.ParseFromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
    (resource,) = request.resource_metrics
    (metric,) = resource.scope_metrics[0].metrics
    (point,) = metric.gauge.data_points
    assert (metric.name, point.as_double) == ("ptbin_checkpoints", 3)
    assert {item.key: item.value.string_value for item in point.attributes} == {
        "dest": "/out",
        "outcome": "converted",
    }
    assert any(item.value.string_value == "ptbin" for item in resource.resource.attributes)
    gateway.status = 400
    with pytest.raises(OSError, match="did not take them"):
        target.send([family])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("graphite:host", "'graphite' is not a target"),
        ("textfile:/nowhere/at/all/x.prom", "there is no folder /nowhere/at/all"),
        ("pushgateway:gateway", "reads http://HOST"),
        ("pushgateway:http://user:hunter2@gateway:port", "reads http://HOST"),
        ("pushgateway:http://[::1", "reads http://HOST"),
        ("pushgateway:http://:9091", "reads http://HOST"),
    ],
)
def test_a_target_that_is_none_is_named(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_targets(text, {})


def test_a_meter_tells_on_what_it_is_told() -> None:
    class Bar(Listener):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def settled(self, entry: Outcome) -> None:
            self.seen.append(entry.path)

        def stage(self, text: str) -> None:
            self.seen.append(text)

    bar = Bar()
    meter = metering.Meter({"dest": "/out"}, bar)
    meter.settled(Outcome("a.pt", "rejected", "corrupt_archive"))
    meter.stage("proving")
    assert bar.seen == ["a.pt", "proving"]
    (found,) = [family for family in meter.families(active=True) if family.name == "run_checkpoints"]
    assert found.samples == [({"dest": "/out", "outcome": "rejected", "reason": "corrupt_archive"}, 1.0)]


def test_the_command_pushes_what_it_would_print(
    tmp_path: Path, gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "_ptbin/runs/20260101T020000Z-a"
    folder.mkdir(parents=True)
    record = {"run_id": "a", "kind": "convert", "source": "/in", "converted": 3, "succeeded": True}
    (folder / "run.json").write_text(json.dumps(record))
    assert cli(["metrics", str(tmp_path), "--pushgateway", gateway.url]) == 0
    assert capsys.readouterr().out == ""
    assert values(gateway.bodies[0][1].decode())["ptbin_checkpoints", "converted"] == 3
    assert cli(["metrics", str(tmp_path), "--pushgateway", "http://127.0.0.1:9"]) == 2
    assert "could not be sent" in capsys.readouterr().err


def test_board_and_rules_ask_for_metrics_that_there_are() -> None:
    there = {f"ptbin_{name}" for name in {**MEANINGS, **metering.MEANINGS}}
    board = json.loads((MONITORING / "grafana-board.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += re.findall(r"expr: (.*?)\n +labels", (MONITORING / "alerts.yml").read_text(), re.DOTALL)
    assert len(queries) > 15
    asked = {name for query in queries for name in re.findall(r"ptbin_\w+", query)}
    assert asked <= there


@pytest.mark.starts_processes
@pytest.mark.parametrize("words", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")])
def test_the_rules_do_what_they_say(words: tuple[str, ...]) -> None:
    program = prometheus_program("promtool")
    if program is None:
        pytest.skip("no promtool here: make prometheus-packages")
    done = subprocess.run([program, *words], cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
