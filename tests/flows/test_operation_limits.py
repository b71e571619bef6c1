"""What an operator's machine or monitoring does to a command: it ends, in one line, and says it once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest
import torch

from flows import metric_targets
from flows.cli.app import run as cli
from flows.cli.progress import PlainProgress
from ptbin.runs.outcomes import Outcome

ended = threading.Event()


class Drips(BaseRequestHandler):
    """An answer whose bytes come one by one, each within the socket's timeout, and that never ends."""

    def handle(self) -> None:
        self.request.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not ended.wait(0.05):
            self.request.sendall(b"x")


class DrippingServer(ThreadingTCPServer):
    daemon_threads = True


def test_a_gateway_that_drips_its_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metric_targets, "ANSWER_SECONDS", 0.5)
    folder = tmp_path / "_ptbin/runs/20260101T020000Z-a"
    folder.mkdir(parents=True)
    record = {"run_id": "a", "kind": "convert", "source": "/in", "converted": 3, "succeeded": True}
    (folder / "run.json").write_text(json.dumps(record))
    with DrippingServer(("127.0.0.1", 0), Drips) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            assert cli(["metrics", str(tmp_path), "--pushgateway", url]) == 2
        finally:
            ended.set()
            server.shutdown()
    assert "did not end within" in capsys.readouterr().err


@pytest.mark.starts_processes
def test_a_run_that_may_open_too_few_files_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    torch.save({"w": torch.zeros(3)}, tmp_path / "in/a.pt")
    shell = 'ulimit -n 40 && exec "$0" -c "from flows.cli import main; main()" "$@"'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, "convert", str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "may open 40 files at once, a run needs 64" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.starts_processes
def test_a_soft_limit_is_raised() -> None:
    code = (
        "import resource; from flows.prefect.open_files import allow_open_files; allow_open_files(); "
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    shell = 'ulimit -Sn 32 && ulimit -Hn 200 && exec "$0" -c "$1"'
    done = subprocess.run(["bash", "-c", shell, sys.executable, code], capture_output=True, text=True)
    assert done.stdout.split() == ["200", "200"], done.stderr


def test_a_known_failure_is_left_to_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PlainProgress()
    progress.settled(Outcome("old.pt", "known", "corrupt_archive", "cut", because="issue 412"))
    progress.settled(Outcome("new.pt", "rejected", "corrupt_archive", "cut"))
    said = capsys.readouterr().err
    assert "new.pt" in said
    assert "old.pt" not in said
    assert {detail for _, detail in progress.reported} == {"cut"}
