"""Metrics on a real Pushgateway and Prometheus: the board's queries have answers, the rules fire."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ptbin
from flows import metering
from flows.cli.app import run as command
from flows.convert import convert
from ptbin.stores import Place
from tests.servers.prefect_stack import wait_for
from tests.servers.prometheus import MONITORING, Prometheus, run_prometheus

pytestmark = [pytest.mark.starts_servers, pytest.mark.usefixtures("server")]

UNDER_WAY = "Under way"


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    try:
        with run_prometheus(tmp_path) as prometheus:
            yield prometheus
    except LookupError as error:
        pytest.skip(str(error))


def board_queries() -> dict[str, list[str]]:
    """By title of the panel, with `All` chosen as destination and kind."""
    board = json.loads((MONITORING / "grafana-board.json").read_text())
    return {
        panel["title"]: [
            target["expr"].replace("$dest", ".*").replace("$kind", ".*") for target in panel["targets"]
        ]
        for panel in board["panels"]
    }


def test_the_board_has_answers_and_the_rules_fire(
    source: Path, tmp_path: Path, prometheus: Prometheus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "SEND_SECONDS", 0.2)
    monkeypatch.setenv("PTBIN_METRICS", f"pushgateway:{prometheus.gateway}")
    all_files, dest = tmp_path / "all", str(tmp_path / "out")
    shutil.copytree(source, all_files)
    for path in [path for path in source.iterdir() if path.is_file()]:
        path.unlink()
    assert convert(str(source), dest, return_state=True).is_completed()
    assert command(["metrics", dest, "--pushgateway", prometheus.gateway]) == 0
    wait_for(lambda: prometheus.query("ptbin_last_run_success == 1"), 30, "the first night's metrics")
    assert prometheus.firing() == set()

    shutil.copytree(all_files, source, dirs_exist_ok=True)
    queries = board_queries()
    under_way: list[str] = []
    stage = ptbin.stage

    def slow_stage(source: Place, *arguments: Any, **keywords: Any) -> Any:
        if source.name == "11.pt":  # the last one waits until Prometheus has seen the others
            for title in [title for title in queries if title.startswith(UNDER_WAY)]:
                wait_for(functools.partial(prometheus.answers, queries[title]), 60, title)
                under_way.append(title)
        return stage(source, *arguments, **keywords)

    monkeypatch.setattr("ptbin.runs.steps.stage", slow_stage)
    assert convert(str(source), dest, force=True, workers=2, return_state=True).is_failed()
    assert len(under_way) == 2, "the run's metrics were there while it ran"
    assert command(["metrics", dest, "--pushgateway", prometheus.gateway]) == 0
    wait_for(lambda: prometheus.query("ptbin_last_run_success == 0"), 30, "the second night's metrics")
    for title, expressions in queries.items():
        if title not in under_way:
            assert prometheus.answers(expressions), title
    (last,) = prometheus.query("ptbin_run_active")
    assert last["value"][1] == "0"
    assert last["metric"].items() >= {"dest": dest, "kind": "convert", "source": str(source)}.items()
    expected = {"PtbinNewFailures", "PtbinRunFailed", "PtbinUnsafePickles"}
    wait_for(lambda: prometheus.firing() == expected, 30, f"{expected}; firing are {prometheus.firing()}")
