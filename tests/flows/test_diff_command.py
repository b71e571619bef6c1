"""`ptbin diff`: exit statuses, one document with `--json`, the rows people read, nothing heavy imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from flows.cli import app
from flows.cli.app import cli

PAGE = Path(__file__).parents[2] / "docs" / "diff.md"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of 30 tensors that differ in 25, the last of them most."""
    a = {f"w{n}": torch.full((4, 4), float(n)) for n in range(30)}
    b = {name: tensor.clone() for name, tensor in a.items()}
    for n in range(25):
        b[f"w{n}"][1, 2] += n + 1
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    return tmp_path / "a.pt", tmp_path / "b.pt"


def run(capsys: Captured, *words: str | Path) -> tuple[int, str, str]:
    status = app.run(["diff", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_exit_statuses(pair: tuple[Path, Path], capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(pair[0].read_bytes()[:-50])
    assert run(capsys, pair[0], pair[0], "-q") == (0, "", "")
    assert run(capsys, *pair, "-q") == (1, "", "")
    for words in (
        (pair[0], tmp_path / "cut.pt"),
        (pair[0], tmp_path / "nothing.pt"),
        (*pair, "--rtol", "-1"),
        (*pair, "--rtol", "x"),
        (*pair, "--select", "x", "--select-a", "y"),
        (*pair, "--rename", "x"),
        (pair[0],),
    ):
        status, text, problems = run(capsys, *words)
        assert (status, text) == (2, "")
        assert problems.startswith("ptbin: error: ")


def test_people_see_the_largest_differences_first(pair: tuple[Path, Path], capsys: Captured) -> None:
    status, text, _ = run(capsys, *pair)
    lines = text.splitlines()
    assert status == 1
    assert lines[0] == "different: 25 of 30 tensors differ"
    first = next(number for number, line in enumerate(lines) if line == "different (25)")
    assert re.split(r"  +", lines[first + 1].strip())[:4] == ["w24", "float32", "4x4", "max abs 25 at [1, 2]"]
    assert lines[-1] == "  ... and 5 more; --all or --json lists them all"
    assert len(run(capsys, *pair, "--all")[1].splitlines()) == len(lines) + 4
    assert run(capsys, pair[0], pair[0])[1].startswith("equal: 30 tensors\n")


def test_json_is_one_document_also_of_a_failure(pair: tuple[Path, Path], capsys: Captured) -> None:
    status, text, _ = run(capsys, *pair, "--json")
    report = json.loads(text)
    assert (status, report["equal"], report["counts"]["different"]) == (1, False, 25)
    assert report["tensors"][0]["numbers"]["max_abs"] == 25
    status, text, _ = run(capsys, pair[0], "nothing.pt", "--json")
    assert (status, json.loads(text)["reason"]) == (2, "storage_error")


@pytest.mark.starts_processes
def test_neither_torch_nor_prefect_is_imported(pair: tuple[Path, Path]) -> None:
    script = (
        "import sys; from flows.cli.app import run; status = run(sys.argv[1:]); "
        "sys.exit(status if not {'torch', 'prefect', 'fsspec'} & set(sys.modules) else 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, "diff", *map(str, pair)], capture_output=True)
    assert done.returncode == 1, done.stderr


def test_help_and_completion(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    text = CliRunner().invoke(cli, ["diff", "--help"]).output
    assert "Exit status: 0 equal; 1 different; 2" in text
    shown = re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8"))
    assert [option for option in shown if option not in text] == []
    monkeypatch.setenv("_PTBIN_COMPLETE", "bash_complete")
    for words, number, wanted in (("ptbin di", "1", "plain,diff"), ("ptbin diff x", "2", "file,x")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", number)
        app.run([])
        assert wanted in capsys.readouterr().out.splitlines()


def test_the_page_s_python(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for place, source in (("run1/last.ckpt", pair[0]), ("weights/last.bin", pair[1])):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_bytes(source.read_bytes())
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    exec(block, space)  # noqa: S102 - our own page
    assert space["found"].equal is False  # type: ignore[attr-defined]
