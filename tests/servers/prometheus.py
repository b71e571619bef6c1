"""A real Prometheus and its Pushgateway on loopback, with the alert rules of deployments/.

`make prometheus-packages` puts the programs into the environment.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.servers.prefect_stack import ROOT, free_port, wait_for

__all__ = ["MONITORING", "Prometheus", "prometheus_program", "run_prometheus"]

MONITORING = ROOT / "deployments" / "monitoring"
CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: pushgateway
    honor_labels: true
    static_configs: [{{targets: ["{gateway}"]}}]
"""


def prometheus_program(name: str) -> str | None:
    """`prometheus`, `promtool` or `prometheus-pushgateway`."""
    ours = Path(sys.prefix) / "prometheus" / "usr" / "bin" / name
    return str(ours) if ours.is_file() else shutil.which(name)


@dataclass(frozen=True)
class Prometheus:
    """The two, as they listen."""

    url: str
    gateway: str

    def ask(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:  # noqa: S310 - loopback
            document = json.load(answer)
        assert document["status"] == "success", document
        return document["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector: labels and value of each series."""
        rows: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return rows

    def answers(self, expressions: Sequence[str]) -> bool:
        """Whether there is something for each of them."""
        return all(self.query(expression) for expression in expressions)

    def firing(self) -> set[str]:
        return {
            row["labels"]["alertname"] for row in self.ask("alerts")["alerts"] if row["state"] == "firing"
        }


@contextlib.contextmanager
def run_prometheus(folder: Path) -> Iterator[Prometheus]:
    """Both servers, which end with the context. Raises LookupError where they are not to be had."""
    programs = [prometheus_program(name) for name in ("prometheus-pushgateway", "prometheus")]
    if None in programs:
        raise LookupError("no prometheus here: make prometheus-packages")
    push, scrape = (f"127.0.0.1:{free_port()}" for _ in range(2))
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(rules=MONITORING / "alerts.yml", gateway=push))
    commands: list[Sequence[str]] = [
        [f"{programs[0]}", f"--web.listen-address={push}"],
        [
            f"{programs[1]}",
            f"--web.listen-address={scrape}",
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
        ],
    ]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "prometheus.log").open("wb"))
        for command in commands:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
        for address in (push, scrape):
            wait_for(functools.partial(_is_ready, address), 60, f"the server at {address}")
        yield Prometheus(f"http://{scrape}", f"http://{push}")


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
