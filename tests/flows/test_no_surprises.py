"""Small things that surprised: names by case, pointers, full disks, documents, the environment, words."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from flows.cli.app import run as run_command
from flows.prefect.child import OrchestratorError
from ptbin.catalog import cases
from ptbin.catalog.request import RunRequest
from ptbin.catalog.worklist import WorkList
from ptbin.runs.outcomes import Outcome
from ptbin.stores.faults import fault
from tasks.batches import batch_task
from tasks.live import LiveRun, Ticket, open_live_run

Captured = pytest.CaptureFixture[str]


def plan(source: Path, dest: Path, **rule: Any) -> tuple[WorkList, list[str]]:
    work = WorkList(str(dest))
    problems = work.plan(RunRequest(str(source), str(dest), kind="sync", **rule))
    return work, [problem.detail for problem in problems]


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """Names that differ in case alone: a companion's and a checkpoint's."""
    source = tmp_path / "in"
    source.mkdir()
    for name in ("README.md", "readme.md"):
        (source / name).write_text(name)
    for name in ("last.pt", "Last.pt"):
        torch.save({"w": torch.ones(2)}, source / name)
    return source


def test_names_that_differ_in_case_are_two_files_where_dest_keeps_them_apart(
    twins: Path, tmp_path: Path
) -> None:
    work, problems = plan(twins, tmp_path / "out")
    assert (work.to_do()[0], problems) == (4, [])
    work.close()


@pytest.mark.parametrize("naming", ["replace", "append"])
def test_where_dest_does_not_the_advice_helps(
    twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naming: str
) -> None:
    monkeypatch.setattr("ptbin.catalog.worklist.folds_case", lambda *_: True)
    work, problems = plan(twins, tmp_path / "out", naming=naming)
    assert len(problems) == 4
    assert all("rename one" in detail and "--naming" not in detail for detail in problems)
    work.close()


def test_advice_fits_the_option_given(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.pt", "a.ckpt"):
        torch.save({"w": torch.ones(2)}, tmp_path / "in" / name)
    work, problems = plan(tmp_path / "in", tmp_path / "out")
    assert all("--naming append" in detail for detail in problems)
    work.close()
    work, problems = plan(tmp_path / "in", tmp_path / "out", naming="append")
    assert not problems
    work.close()


def test_a_file_system_says_by_itself_whether_it_folds_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptbin.stores import open_store

    assert not cases.folds_case(*open_store(str(tmp_path / "a/b")))
    monkeypatch.setattr(os.path, "exists", lambda _: True)
    monkeypatch.setattr(os.path, "samefile", lambda *_: True)
    assert cases.folds_case(*open_store(str(tmp_path / "a/b")))
    assert not cases.folds_case(*open_store("memory://a/b"))


def test_a_full_disk_ends_the_batch_after_a_few() -> None:
    @batch_task("fill")
    def fill(_live: LiveRun, path: str) -> Outcome:
        raise fault(OSError(errno.ENOSPC, "full"), "write", path)

    with open_live_run(LiveRun("full")):
        outcomes = fill.fn(Ticket("full"), [str(number) for number in range(9)], {}).result()
    assert [outcome.kind for outcome in outcomes] == ["failed"] * 3 + ["not_tried"] * 6
    assert "free some space" in outcomes[0].detail


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "missing.pt", "out.bin"],
        ["convert", "a", "b", "c"],
        ["convert", "in.pt", "out.onnx"],
        ["verify", "missing"],
        ["sync", "missing", "out"],
        ["convert", "in.pt", "out.bin", "--dtype", "decimal"],
    ],
)
def test_json_gives_a_document_for_a_wrong_call(
    words: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command([*words, "--json"]) == 2
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert document["exit_status"] == 2
    assert document["reason"]
    assert document["detail"] in told.err


def test_options_come_from_the_environment(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "in.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTBIN_DTYPE", "float16")
    monkeypatch.setenv("PTBIN_CONVERT_JSON", "1")
    assert run_command(["convert", "in.pt", "out.bin"]) == 0
    assert json.loads(capsys.readouterr().out)["converted"] == 1
    assert torch.load("out.bin", weights_only=True)["w"].dtype == torch.float16


def test_one_tensor_is_a_tensor(tmp_path: Path, capsys: Captured) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "in.pt")
    assert run_command(["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.bin")]) == 0
    assert "1 tensor, " in capsys.readouterr().out


def test_a_shell_s_glob_is_explained(tmp_path: Path, capsys: Captured) -> None:
    assert run_command(["convert", "a.pt", "b.pt", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "quote a glob" in told
    assert "--files-from" in told
    assert run_command(["verify", "a.bin", "b.bin"]) == 2
    told = capsys.readouterr().err
    assert "quote a glob" in told
    assert "--files-from" not in told


@pytest.mark.starts_processes
def test_what_a_store_s_library_logs_is_no_part_of_the_message(tmp_path: Path) -> None:
    code = (
        "import logging, sys; from flows.cli import app; from ptbin import inspection\n"
        "def look(*_, **__): logging.getLogger('gcsfs').error('out of retries'); raise OSError('away')\n"
        "inspection.inspect = look; import ptbin; ptbin.inspect = look; sys.exit(app.run(sys.argv[1:]))"
    )
    for extra, shown in (((), False), (("--log-level", "debug"), True)):
        words = [sys.executable, "-c", code, "inspect", str(tmp_path / "x.pt"), *extra]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert ("out of retries" in done.stderr) == shown
        assert "away" in done.stderr


def test_a_run_that_cannot_begin_leaves_no_empty_folders(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OrchestratorError("no server")

    monkeypatch.setattr("flows.prefect.orchestrator.import_prefect", away)
    monkeypatch.setattr("flows.prefect.orchestrator.start_early", lambda: None)
    (tmp_path / "in").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "in" / "a.pt")
    for dest in ("new/out", "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        assert run_command(["convert", str(tmp_path / "in"), str(tmp_path / dest)]) == 2
    assert "no server" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.pt", "in", "there"]


def test_each_problem_is_printed_once(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.prefect.orchestrator.import_prefect", None)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"bad\xff\n.pt")).write_bytes(b"x")
    assert run_command(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    told = capsys.readouterr()
    assert (told.out + told.err).count("unsafe_path") == 1
    assert "1 problem, listed above" in told.out
    # By one name everywhere, which `acknowledge` takes: on the screen, and in what pages are made of.
    assert r"in/bad\xff\n.pt: unsafe_path" in told.err
    assert r'"path":"bad\\xff\\n.pt"' in (tmp_path / "out" / "_ptbin" / "unconverted.jsonl").read_text()


def test_quiet_nights_are_in_the_history_that_records_hand_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flows.prefect.orchestrator.import_prefect", None
    )  # nothing to do: Prefect is not asked
    (tmp_path / "in").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "in" / "a.pt")
    ptbin.convert(tmp_path / "in" / "a.pt", tmp_path / "out" / "a.bin")
    for _ in range(3):
        assert run_command(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--quiet"]) == 0
    found = [
        json.loads(path.read_text()) for path in (tmp_path / "out" / "_ptbin" / "runs").glob("*/run.json")
    ]
    found.sort(key=lambda record: len(record["history"]))
    runs = [record["run_id"] for record in found]
    assert [record["previous_run"] for record in found] == [None, *runs[:2]]
    assert [[row["run_id"] for row in record["history"]] for record in found] == [[], runs[:1], runs[:2]]
