"""Batches on processes, Dask and Ray: the same outputs, and what happens when a worker is killed.

Where processes are killed or interrupted they are real ones, with Python started anew (`REAL`).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from prefect.task_runners import TaskRunner

from flows.convert import convert
from flows.prefect.orchestrator import Orchestrator
from flows.runners import Runner, open_runner
from ptbin.errors import UsageError
from ptbin.runs.run_ids import new_run_id
from tasks.live import LiveRun, open_live_run
from tests.servers.dask_cluster import DaskCluster, dask_cluster
from tests.warm_python import stand_in

Start = Callable[..., "subprocess.Popen[str]"]

REAL = sys.executable

# Each conversion takes a while and notes where it runs, so that a test can kill a process with work in hand.
SLOW = """
import os, time
from pathlib import Path
import ptbin
import ptbin.runs.steps
really = ptbin.runs.steps.stage
def stage(source, dest, *arguments, progress, **options):
    with open(os.environ["PTBIN_TEST_NOTES"], "a") as notes:
        notes.write(f"{os.getpid()} {os.nice(0)} {source}\\n")
    deadline = time.monotonic() + float(os.environ["PTBIN_TEST_SECONDS"])
    place = sum(1 for _ in open(os.environ["PTBIN_TEST_NOTES"]))
    held = place > int(os.environ.get("PTBIN_TEST_MOST", "1000"))
    while time.monotonic() < deadline or held or os.path.exists(os.environ["PTBIN_TEST_NOTES"] + ".hold"):
        time.sleep(0.02)
        progress(0)
    return really(source, dest, *arguments, progress=progress, **options)
ptbin.runs.steps.stage = stage
"""
COMMAND = "from flows.cli import main\nif __name__ == '__main__':\n    main()\n"


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Forty small checkpoints."""
    source = tmp_path / "many"
    source.mkdir()
    for number in range(40):
        torch.save(
            {"state_dict": {"w": torch.full((64,), float(number))}, "epoch": number},
            source / f"{number:02}.pt",
        )
    return source


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every process started from here on converts slowly and notes what it does in this file."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'PTBIN_TEST_NOTES' in os.environ:\n"
        "    import importlib.abc, importlib.util\n"
        "    exec(compile(open(os.environ['PTBIN_TEST_SLOW']).read(), 'slow', 'exec'))\n"
    )
    (tmp_path / "slow.py").write_text(SLOW)
    file = tmp_path / "notes"
    file.touch()
    monkeypatch.setenv("PTBIN_TEST_NOTES", str(file))
    monkeypatch.setenv("PTBIN_TEST_SLOW", str(tmp_path / "slow.py"))
    monkeypatch.setenv("PTBIN_TEST_SECONDS", "0.1")
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{path}" if path else str(site))
    return file


@pytest.fixture
def start(server: Orchestrator, tmp_path: Path) -> Iterator[Start]:
    """Start the command line on the session's server."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str | Path, python: str | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [python or stand_in(), "-c", COMMAND, *map(str, words)],
            cwd=tmp_path,
            env=os.environ | {"PREFECT_API_URL": server.api_url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DaskCluster]:
    folder = tmp_path / "dask"
    folder.mkdir()
    with dask_cluster(folder) as running:
        yield running


def summary_of(process: subprocess.Popen[str], status: int = 0) -> dict[str, Any]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, err
    found: dict[str, Any] = json.loads(out)
    return found


def convert_here(source: Path, dest: Path) -> dict[str, Any]:
    """The summary of a run in this process, on threads: three seconds of a core less than a command."""
    with open_live_run(LiveRun(new_run_id())) as live:
        convert(source=str(source), dest=str(dest), run_id=live.run_id, return_state=True)
    return live.summary


def digests(dest: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(dest.rglob("*.bin"))}


def wait_for(condition: Callable[[], object], seconds: float = 250) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def workers_in(notes: Path) -> set[int]:
    return {int(line.split()[0]) for line in notes.read_text().splitlines()}


def assert_all_there(dest: Path, count: int) -> None:
    for number in range(count):
        loaded = torch.load(dest / f"{number:02}.bin", weights_only=True)
        assert torch.equal(loaded["w"], torch.full((64,), float(number)))
        assert (dest / f"{number:02}.bin.manifest.json").exists()
    assert not list((dest / "_ptbin" / "leases").glob("*"))


@pytest.mark.parametrize("runner", ["processes", "dask", "ray"])
def test_every_runner_makes_the_same_outputs(
    many: Path, notes: Path, tmp_path: Path, start: Start, runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"processes": "prefect", "dask": "prefect_dask", "ray": "prefect_ray"}[runner])
    monkeypatch.setenv("PTBIN_TEST_SECONDS", "0")
    one = convert_here(many, tmp_path / "threads")
    python = REAL if runner == "ray" else None  # which starts programs that know nothing of a stand-in
    other = summary_of(start("convert", many, tmp_path / runner, "--json", "--runner", runner, python=python))
    assert one["converted"] == other["converted"] == 40
    assert digests(tmp_path / "threads") == digests(tmp_path / runner)
    assert_all_there(tmp_path / runner, 40)
    # Beside busy processes, a worker that is nicer than they are hardly moves.
    assert {int(line.split()[1]) for line in notes.read_text().splitlines()} == {os.nice(0)}


class Starting(TaskRunner[Any]):
    """An engine that a busy machine lets start at the second try, or never."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__()
        self.failures = failures

    def __enter__(self) -> Self:
        if self.failures:
            raise RuntimeError(self.failures.pop())
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def duplicate(self) -> Starting:
        return self

    submit = None  # type: ignore[assignment]


def test_an_engine_that_does_not_start_at_once_is_tried_again() -> None:
    failures = ["too slow"]
    Runner("ray", 2, lambda: Starting(failures)).open()
    assert not failures
    failures = ["too slow"] * 9
    with pytest.raises(UsageError, match="ray does not start: too slow"):
        Runner("ray", 2, lambda: Starting(failures)).open()
    assert failures


def test_secrets_reach_the_workers_and_nothing_else(
    good_source: Path, tmp_path: Path, start: Start, database: Callable[[str], list[tuple[Any, ...]]]
) -> None:
    """Options given by value go along with each batch, and stand in no log and no database."""
    dest = f"simplecache::file://{tmp_path}/out"
    process = start(
        "convert", good_source, dest, "--json", "--runner", "processes", "--log-level", "info",
        "--dest-options", json.dumps({"simplecache": {"cache_storage": str(tmp_path / "hush-hush")}}),
    )  # fmt: skip
    out, err = process.communicate(timeout=600)
    assert "hush-hush" not in out + err
    dump = [row for (table,) in database("SELECT name FROM sqlite_master WHERE type = 'table'")
            for row in database(f"SELECT * FROM '{table}'")]  # fmt: skip
    assert "hush-hush" not in repr(dump)


def test_a_killed_process_of_the_pool_costs_its_batch_a_second_try(
    many: Path, notes: Path, tmp_path: Path, start: Start
) -> None:
    process = start("convert", many, tmp_path / "out", "--json", "--runner", "processes", python=REAL)
    wait_for(lambda: len(notes.read_text().splitlines()) > 4)
    os.kill(next(iter(workers_in(notes))), signal.SIGKILL)
    summary = summary_of(process)
    assert (summary["converted"], summary["failed"]) == (40, 0)
    assert len(workers_in(notes)) > 2
    assert_all_there(tmp_path / "out", 40)


# Both signals end in the same call, whatever the runner (`test_cli_process` sends both to threads).
@pytest.mark.parametrize(
    ("runner", "number"),
    [("threads", signal.SIGINT), ("processes", signal.SIGINT), ("dask", signal.SIGTERM)],
)
def test_an_interrupted_run_ends_soon_and_accounts_for_itself(
    many: Path,
    notes: Path,
    tmp_path: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    runner: str,
    number: int,
) -> None:
    monkeypatch.setenv("PTBIN_TEST_MOST", "12")  # those after it wait, however late the signal comes
    dest = tmp_path / "out"
    process = start("convert", many, dest, "--json", "--runner", runner, python=REAL)
    wait_for(lambda: len(list(dest.rglob("*.manifest.json"))) > 3)
    workers = workers_in(notes) - {process.pid}
    process.send_signal(number)
    summary = summary_of(process, 130)
    assert (summary["reason"], summary["exit_status"]) == ("interrupted", 130)
    (record,) = (dest / "_ptbin" / "runs").glob("*/run.json")
    told = json.loads(record.read_text())
    assert told["interrupted"]
    assert told["converted"] == summary["converted"] == len(list(dest.rglob("*.manifest.json"))) > 0
    assert told["converted"] + told["not_tried"] == 40
    assert told["not_tried"] > 0
    assert not list((dest / "_ptbin" / "leases").glob("*"))
    for worker in workers:
        wait_for(lambda worker=worker: not Path(f"/proc/{worker}").exists())  # type: ignore[misc]
    again = convert_here(many, dest)
    assert again["converted"] + again["up_to_date"] == 40
    assert again["up_to_date"] == told["converted"]


def test_processes_of_a_killed_run_end_by_themselves(
    many: Path, notes: Path, tmp_path: Path, start: Start
) -> None:
    process = start("convert", many, tmp_path / "out", "--json", "--runner", "processes", python=REAL)
    wait_for(lambda: len(workers_in(notes)) == 2)
    workers = workers_in(notes)
    process.kill()
    for worker in workers:
        wait_for(lambda worker=worker: not Path(f"/proc/{worker}").exists())  # type: ignore[misc]
    # Nobody waits for the dead run's lease: its process is known to be gone.
    again = convert_here(many, tmp_path / "out")
    assert again["converted"] + again["up_to_date"] == 40
    assert_all_there(tmp_path / "out", 40)


def test_a_dask_cluster_outlives_a_worker_and_a_run_that_are_killed(
    many: Path, notes: Path, tmp_path: Path, cluster: DaskCluster, start: Start
) -> None:
    words = ("--json", "--runner", "dask", "--runner-address", cluster.address)
    process = start("convert", many, tmp_path / "first", *words)
    wait_for(lambda: len(workers_in(notes)) == 2)
    cluster.workers.pop(0).kill()
    summary = summary_of(process)
    assert (summary["converted"], summary["failed"]) == (40, 0)
    sources = [line.split()[2] for line in notes.read_text().splitlines()]
    twice = {source for source in sources if sources.count(source) > 1}
    assert len(set(sources)) == 40
    assert len(twice) <= 10  # a batch: what was in flight
    assert_all_there(tmp_path / "first", 40)

    cluster.add_worker()
    notes.write_text("")
    process = start("convert", many, tmp_path / "second", *words, python=REAL)
    wait_for(lambda: len(workers_in(notes)) == 2)
    process.kill()
    again = summary_of(start("convert", many, tmp_path / "second", *words))
    assert again["converted"] + again["up_to_date"] == 40
    assert all(worker.poll() is None for worker in cluster.workers)
    assert_all_there(tmp_path / "second", 40)


@pytest.mark.parametrize(
    ("runner", "message"), [("dask", "no Dask scheduler answers"), ("threads", "means nothing to threads")]
)
def test_a_runner_that_is_not_there_is_a_mistake_of_the_call(
    monkeypatch: pytest.MonkeyPatch, runner: Any, message: str
) -> None:
    monkeypatch.setattr("flows.runners.CONNECT_SECONDS", 1)
    with pytest.raises(UsageError, match=message), open_runner(runner, "tcp://127.0.0.1:9", None):
        pass


def test_a_password_in_a_runner_s_address_is_refused_and_not_shown(
    good_source: Path, tmp_path: Path, start: Start
) -> None:
    process = start(
        "convert",
        good_source,
        tmp_path / "out",
        "--runner",
        "dask",
        "--runner-address",
        "tcp://u:hunter2@127.0.0.1:9",
    )
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "carries a password" in err
    assert "hunter2" not in err
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_second_run_on_the_destination_is_refused_while_the_first_works(
    many: Path, notes: Path, tmp_path: Path, start: Start
) -> None:
    hold = notes.with_name(notes.name + ".hold")
    hold.touch()  # the first works until the second has been answered, however long that takes
    first = start("convert", many, tmp_path / "out", "--json")
    wait_for(notes.read_text)
    second = start("convert", many, tmp_path / "out")
    _, err = second.communicate(timeout=100)
    hold.unlink()
    assert second.returncode == 2
    assert "is at work there" in err
    assert summary_of(first)["converted"] == 40
