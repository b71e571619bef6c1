"""What a call imports: its own command, and nothing that only others need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flows.cli.app import COMMANDS, cli

pytestmark = pytest.mark.starts_processes

PROGRAM = """
import sys
from flows.cli.app import run
status = run(sys.argv[1:])
print("\\n" + " ".join(sorted(sys.modules)))
sys.exit(status)
"""


def imported(*words: str) -> set[str]:
    """Names of the modules that a call leaves imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PTBIN_")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, *words],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return set(done.stdout.splitlines()[-1].split())


def commands_among(modules: set[str]) -> set[str]:
    return {name for name in modules if name.startswith("flows.cli.") and name.endswith("_command")}


def test_a_call_imports_its_command_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    assert commands_among(imported("--version")) == set()
    assert commands_among(imported("inspect", str(tmp_path / "a.pt"))) == {"flows.cli.inspect_command"}
    modules = imported("convert", str(tmp_path / "a.pt"), str(tmp_path / "a.bin"))
    assert commands_among(modules) == {"flows.cli.convert_command"}
    assert not {"asyncio", "sqlite3", "fsspec", "prefect", "torch", "rich"} & modules


def test_every_command_of_the_help_can_be_called() -> None:
    names = [name for below in COMMANDS.values() for name in below]
    assert sorted(names) == sorted(cli.commands)
    assert [cli.commands[name].name for name in names] == names
    assert "no-such-command" not in cli.commands
