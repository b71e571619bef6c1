"""A Prefect server for the flow tests, and small checkpoints to convert.

The server is the product's own embedded one (`flows.prefect.orchestrator`), over a home of the test session:
it takes some seconds once, and its database can be read afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flows.prefect.orchestrator import Orchestrator, orchestrator
from tests.servers.prefect_home import prefect_template
from tests.warm_python import stand_in


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of Prefect's server."""
    return prefect_template(tmp_path_factory)


@pytest.fixture(scope="session")
def prefect_home(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prefect's home for all of the session, in this process and in those it starts."""
    from prefect.context import refresh_global_settings_context

    home = tmp_path_factory.mktemp("prefect")
    shutil.copyfile(template, home / "prefect.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.delenv("PREFECT_PROFILE", raising=False)
        refresh_global_settings_context()
        yield home
    refresh_global_settings_context()


@pytest.fixture(scope="session")
def server(prefect_home: Path) -> Iterator[Orchestrator]:
    """A running embedded server that this process's flows use."""
    with contextlib.ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", stand_in())
            server = running.enter_context(orchestrator())
        with pytest.MonkeyPatch.context() as patch:
            # Each flow run makes a client, and that reads all certificates anew: 25 ms.
            patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
            yield server


@pytest.fixture(scope="session")
def database(prefect_home: Path) -> Callable[[str], list[tuple[Any, ...]]]:
    """Ask the server's database a question."""

    def ask(question: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(prefect_home / "prefect.db")
        try:
            return connection.execute(question).fetchall()
        finally:
            connection.close()

    return ask


@pytest.fixture(scope="session")
def _blank(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    import torch

    path = tmp_path_factory.mktemp("blank") / "blank.pt"
    torch.save({"state_dict": {"w": torch.arange(64.0), "b": torch.ones(8)}, "epoch": 3}, path)
    return path.read_bytes()


@pytest.fixture
def source(tmp_path: Path, _blank: bytes) -> Path:
    """Twelve good checkpoints, a hostile one, a truncated one, two that collide, and a bystander."""
    source = tmp_path / "source"
    (source / "run").mkdir(parents=True)
    for number in range(12):
        (source / "run" / f"{number:02}.pt").write_bytes(_blank)
    (source / "hostile.pkl").write_bytes(b"cposix\nsystem\n(S'touch /tmp/never'\ntR.")
    (source / "truncated.pt").write_bytes(_blank[:-40])
    (source / "twin.pt").write_bytes(_blank)
    (source / "twin.ckpt").write_bytes(_blank)
    (source / "notes").write_text("no checkpoint, and its name does not promise one")
    return source


@pytest.fixture
def good_source(tmp_path: Path, _blank: bytes) -> Path:
    """Six good checkpoints."""
    source = tmp_path / "good"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.pt").write_bytes(_blank)
    return source


@pytest.fixture
def checkpoint(good_source: Path) -> Path:
    """One good checkpoint."""
    return good_source / "0.pt"


COMMAND = "from flows.cli import main; main()"


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    """Prefect's home of the commands that a test runs."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(template, home / "prefect.db")
    return home


@pytest.fixture
def ptbin(home: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line as a process of its own, in the test's folder."""

    def run(
        *words: str | Path,
        code: str = COMMAND,
        home: Path = home,
        python: str | None = None,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_of(words, code, python),
            cwd=tmp_path,
            env=environment_of(home, environment),
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture
def ptbin_started(home: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command line and leave it running; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str | Path, code: str = COMMAND, python: str | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command_of(words, code, python),
            cwd=tmp_path,
            env=environment_of(home, {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def command_of(words: Sequence[str | Path], code: str, python: str | None) -> list[str]:
    return [python or stand_in(), "-c", code, *map(str, words)]


def environment_of(home: Path, more: dict[str, str]) -> dict[str, str]:
    """This process's environment, without the server that its own flows use."""
    inherited = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    return inherited | {"PREFECT_HOME": str(home)} | more
