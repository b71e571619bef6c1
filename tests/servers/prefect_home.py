"""Prefect's database as its migrations leave it, made once for all processes of the suite and copied.

A server over a fresh home spends half of its start with the migrations: four seconds of a core.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.warm_python import stand_in

__all__ = ["prefect_template"]


def prefect_template(factory: pytest.TempPathFactory) -> Path:
    """The database to copy to `prefect.db` of a new home."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each process of pytest-xdist has its own below it
    made = folder / "prefect-template.db"
    with (folder / "prefect-template.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _migrate(folder / "prefect-template", made)
    return made


def _migrate(home: Path, made: Path) -> None:
    command = [stand_in("prefect"), "server", "database", "upgrade", "--yes"]
    settings = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    settings["PREFECT_HOME"] = str(home)
    done = subprocess.run(command, env=settings, cwd=made.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # Not the file: part of its content is in the log beside it.
    with (
        contextlib.closing(sqlite3.connect(home / "prefect.db")) as filled,
        contextlib.closing(sqlite3.connect(made.with_suffix(".part"))) as copy,
    ):
        filled.backup(copy)
    made.with_suffix(".part").rename(made)
