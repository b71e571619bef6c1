"""A rerun with nothing to do: no Prefect, no server, and all that a run leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from flows.cli.app import run as run_command
from ptbin.history.records import iter_runs

Captured = pytest.CaptureFixture[str]


class NeedsPrefectError(Exception):
    """The run goes on in the flow."""


@pytest.fixture(autouse=True)
def _no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NeedsPrefectError

    monkeypatch.setattr("flows.prefect.orchestrator.import_prefect", refuse)
    monkeypatch.setattr("flows.prefect.orchestrator.start_early", lambda: None)


@pytest.fixture
def places(tmp_path: Path) -> tuple[str, str]:
    """Three checkpoints and an optimizer, and their outputs."""
    source, dest = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(3):
        torch.save({"w": torch.arange(9.0) + number}, source / f"{number}.pt")
        ptbin.convert(str(source / f"{number}.pt"), str(dest / f"{number}.bin"))
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    torch.save(optimizer.state_dict(), source / "optimizer.pt")
    return str(source), str(dest)


def needs_prefect(*words: str) -> bool:
    return run_command(list(words)) == 1


def summary_of(capsys: Captured, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run_command([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("command", ["convert", "sync"])
def test_nothing_to_do_needs_no_prefect(places: tuple[str, str], capsys: Captured, command: str) -> None:
    found = summary_of(capsys, command, *places)
    assert (found["up_to_date"], found["left_alone"], found["problems"]) == (3, 1, [])
    assert summary_of(capsys, command, *places)["up_to_date"] == 3
    runs = list(iter_runs(places[1]))
    assert [run.text("kind") for run in runs] == [command, command]
    assert all(run.succeeded for run in runs)
    assert not list(Path(places[1], "_ptbin/leases").glob("*"))
    report = Path(places[1], "_ptbin/runs", runs[0].run_id, "report.html")
    assert "up to date" in report.read_text().replace("_", " ")


def test_what_is_refused_is_told_by_such_a_run_too(places: tuple[str, str], capsys: Captured) -> None:
    Path(places[0], "two\nlines.pt").write_bytes(b"x")
    capsys.readouterr()
    assert run_command(["convert", *places, "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["reason"], problem["novelty"]) == ("unsafe_path", "new")
    assert run_command(["convert", *places, "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["novelty"] == "old"


def test_anything_to_do_goes_on_in_the_flow(places: tuple[str, str], tmp_path: Path) -> None:
    source, dest = map(Path, places)
    assert not needs_prefect("convert", *places)
    assert needs_prefect("convert", *places, "--force")
    assert needs_prefect("convert", *places, "--dtype", "float16")
    assert needs_prefect("sync", *places, "--checksum")
    os.utime(source / "1.pt", (1, 1))
    assert needs_prefect("convert", *places)
    assert not needs_prefect("convert", *places, "--exclude", "1.pt")
    assert needs_prefect("sync", *places, "--exclude", "nothing")
    (source / "1.pt").unlink()
    assert not needs_prefect("sync", *places)
    assert needs_prefect("sync", *places, "--delete")
    (dest / "2.bin").unlink()
    assert needs_prefect("convert", *places)
    (source / "config.json").write_text("{}")
    assert needs_prefect("sync", *places, "--exclude", "2.pt")
    torch.save({"w": torch.ones(2)}, source / "optimizer.pt")  # a model after all
    assert needs_prefect("convert", *places, "--exclude", "2.pt")
    assert not list((dest / "_ptbin/leases").glob("*"))


def test_the_server_starts_when_there_is_something_new(
    places: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr("flows.prefect.orchestrator.start_early", lambda: started.append("yes"))
    run_command(["convert", *places])
    assert not started  # the optimizer has no output, and never will
    torch.save({"w": torch.ones(2)}, Path(places[0], "0.ckpt"))
    run_command(["convert", *places, "--naming", "append"])
    assert started == ["yes"]
