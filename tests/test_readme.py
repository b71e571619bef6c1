"""The README's Python runs as it stands; its commands do in tests/test_newcomer.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import FACTORIES

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def _block(language: str) -> str:
    found = re.search(
        rf"<!-- tests/test_readme.py runs th\w+ -->\n```{language}\n(.*?)```", README, re.DOTALL
    )
    assert found, f"the README has no {language} block to run"
    return found[1]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "run1").mkdir()
    (tmp_path / "weights").mkdir()
    made = FACTORIES["lightning_like"].make(tmp_path)
    shutil.move(made.path, tmp_path / "run1" / "last.ckpt")
    return tmp_path


@pytest.mark.starts_processes
def test_python(workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _block("python")], cwd=workplace, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("safe state_dict ")


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parent.parent
    assert [link for link in re.findall(r"\]\(([^)#:]+)\)", README) if not (root / link).exists()] == []
