"""What a command says of variables that it does not read, and of places that end with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from flows.cli.app import cli
from flows.cli.app import run as run_command
from flows.cli.environment import unread_variables

Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.fixture(autouse=True)
def _each_is_reported_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.environment.reported_names", set())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("PTBIN_FROCE", "PTBIN_FORCE"),
        ("PTBIN_CONVERT_WROKERS", "PTBIN_CONVERT_WORKERS"),
        ("PTBIN_METRIC", "PTBIN_METRICS"),
        ("ptbin_workers", "PTBIN_WORKERS"),
        ("PTBIN_MAX_WORKERS", "PTBIN_WORKERS"),
    ],
)
def test_a_misspelled_variable_is_one_line_with_the_nearest_name(
    source: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert run_command(["inspect", str(source), "--json"]) == 0
    printed = capsys.readouterr()
    json.loads(printed.out)
    (line,) = printed.err.splitlines()
    assert line == f"ptbin: warning: {name} is set, which ptbin does not read: did you mean {meant}?"


def test_variables_of_somebody_elses_are_left_alone() -> None:
    assert unread_variables(cli.commands.values(), ["PTBIN_IMAGE", "PTBIN_TEST_NOTES", "PATH"]) == ""


def test_variables_that_the_deployments_and_the_docs_name_are_known() -> None:
    files = [
        path
        for folder in ("deployments", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".md", ".yaml", ".yml", ".service", ".example", ".py", ""} and path.is_file()
    ]
    named = {name for path in files for name in re.findall(r"\bPTBIN_[A-Z_]+\b", path.read_text())}
    assert {"PTBIN_METRICS", "PTBIN_WORKDIR", "PTBIN_ARRIVALS_TOKEN"} <= named
    assert unread_variables(cli.commands.values(), named) == ""


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "memory://x.bin"],
        ["convert", "memory://x"],
        ["convert", "simplecache::memory://x.bin"],
        ["sync", "memory://x"],
        ["migrate", "memory://x"],
        ["restore", "memory://x.pt"],
        ["sync", "mirror", "--backup-dir", "memory://x"],
    ],
)
def test_what_would_end_with_the_command_is_refused(
    source: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = source if words[-1].endswith((".bin", ".pt")) else tmp_path
    assert run_command([words[0], str(given), *words[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the memory of this process, which ends with the command: write to a directory" in line
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("dest", ["zip://x.bin::{}/is.zip", "zip://x.bin::{}/none.zip", "zip://x::{}/a.pt"])
def test_an_archive_as_dest_is_refused_in_one_line(
    source: Path, tmp_path: Path, capsys: Captured, dest: str
) -> None:
    (tmp_path / "is.zip").write_bytes(b"PK\5\6" + bytes(18))
    assert run_command(["convert", str(source), dest.format(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is only read" in line or "no such file" in line
    assert "fault in ptbin" not in line
