"""Prefect's database as its migrations leave it, made once for all processes of the suite and copied.

A server over a fresh home spends half of its start with the migrations: four seconds of a core.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.once import made_for_all
from tests.warm_python import stand_in

__all__ = ["prefect_template"]


def prefect_template(factory: pytest.TempPathFactory) -> Path:
    """The database to copy to `prefect.db` of a new home."""
    return made_for_all(factory, "prefect-template", _migrate) / "copy.db"


def _migrate(home: Path) -> None:
    command = [stand_in("prefect"), "server", "database", "upgrade", "--yes"]
    settings = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    settings["PREFECT_HOME"] = str(home)
    done = subprocess.run(command, env=settings, cwd=home, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # Not the file: part of its content is in the log next to it.
    with (
        contextlib.closing(sqlite3.connect(home / "prefect.db")) as filled,
        contextlib.closing(sqlite3.connect(home / "copy.db")) as copy,
    ):
        filled.backup(copy)
