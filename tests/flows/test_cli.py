"""The command line in this process: exit statuses, what goes to which stream, what is told."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pydantic
import pytest
from click.testing import CliRunner

import ptbin
from flows.cli import app
from flows.cli.app import cli
from flows.cli.pace import Pace
from flows.cli.printing import align, printable
from flows.cli.progress import PlainProgress
from flows.cli.summary import JSON_KEYS
from flows.interrupts import interrupts_held
from ptbin.errors import short_detail
from ptbin.runs.outcomes import Outcome
from ptbin.runs.units import format_nbytes

Captured = pytest.CaptureFixture[str]
FIELDS_OF_INSPECT = {"uri", "container", "size", "selected", "state_dicts", "tensors", "globals", "verdict"}


def run(capsys: Captured, *words: str | Path) -> tuple[int, str, str]:
    status = app.run([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("command", ["", "inspect", "convert", "verify"])
def test_help_has_examples_and_exit_statuses(command: str) -> None:
    result = CliRunner().invoke(cli, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert "ptbin " in result.output


def test_version(capsys: Captured) -> None:
    assert run(capsys, "--version") == (0, f"ptbin {ptbin.__version__}\n", "")


def test_one_checkpoint_becomes_one_output_and_then_is_up_to_date(
    checkpoint: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "made" / "x.bin"
    status, text, problems = run(capsys, "convert", checkpoint, out)
    assert (status, problems) == (0, "")
    assert re.match(rf"0\.pt \(.* KiB\) -> {out} \(.* KiB\): 2 tensors, ", text)
    assert {path.name for path in out.parent.iterdir()} == {"x.bin", "x.bin.manifest.json"}
    before = out.stat().st_mtime_ns
    assert run(capsys, "convert", checkpoint, out) == (0, f"{out} is up to date\n", "")
    assert out.stat().st_mtime_ns == before
    assert run(capsys, "convert", checkpoint, out, "--force")[0] == 0
    assert out.stat().st_mtime_ns != before


def test_one_checkpoint_into_a_directory(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    assert run(capsys, "convert", checkpoint, tmp_path / "out", "--naming", "append", "-q") == (0, "", "")
    assert (tmp_path / "out" / "0.pt.bin").exists()


def test_json_is_one_document_with_the_promised_fields(
    checkpoint: Path, tmp_path: Path, capsys: Captured
) -> None:
    status, text, _ = run(capsys, "convert", checkpoint, tmp_path / "x.bin", "--json")
    summary = json.loads(text)
    assert status == 0
    assert tuple(summary) == JSON_KEYS
    assert (summary["converted"], summary["source_bytes"]) == (1, checkpoint.stat().st_size)
    assert summary["manifests"] == [str(tmp_path / "x.bin.manifest.json")]

    status, text, _ = run(capsys, "inspect", checkpoint, "--json")
    assert status == 0
    assert set(json.loads(text)) >= FIELDS_OF_INSPECT

    status, text, _ = run(capsys, "verify", tmp_path / "x.bin", "--json")
    assert (status, json.loads(text)["proven"], json.loads(text)["issues"]) == (0, 1, [])


def test_a_refused_checkpoint_is_status_1_and_one_line(
    source: Path, tmp_path: Path, capsys: Captured
) -> None:
    status, text, problems = run(capsys, "convert", source / "hostile.pkl", tmp_path / "x.bin")
    assert (status, text) == (1, "")
    assert problems.startswith("ptbin: rejected hostile.pkl: unsafe_pickle: ")
    assert problems.count("\n") == 1
    assert not (tmp_path / "x.bin").exists()
    status, text, _ = run(capsys, "convert", source / "hostile.pkl", tmp_path / "x.bin", "--json", "-q")
    assert (status, json.loads(text)["problems"][0]["reason"]) == (1, "unsafe_pickle")
    status, text, problems = run(capsys, "inspect", source / "truncated.pt", "--json")
    assert (status, json.loads(text)["reason"]) == (1, "corrupt_archive")
    assert problems.startswith("ptbin: error: corrupt_archive: ")


def test_verify_of_one_output(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "x.bin"
    run(capsys, "convert", checkpoint, out)
    assert run(capsys, "verify", out)[0] == 0
    assert run(capsys, "verify", f"{out}.manifest.json", "--level", "load")[0] == 0
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    out.write_bytes(data)
    status, text, _ = run(capsys, "verify", out)
    assert status == 1
    assert "checksum_mismatch" in text
    (tmp_path / "x.bin.manifest.json").unlink()
    status, text, _ = run(capsys, "verify", out)
    assert status == 1
    assert "no_manifest" in text


WRONG_CALLS = {
    "a source that is missing": ["convert", "missing.pt", "x.bin"],
    "a source that is empty": ["convert", "empty", "out"],
    "a destination inside the source": ["convert", "good", "good/out"],
    "a destination that is the source": ["convert", "good", "good"],
    "a destination that cannot be written": ["convert", "good", "good/0.pt/out"],
    "one name for many outputs": ["convert", "good", "x.bin"],
    "an unknown naming": ["convert", "good", "out", "--naming", "other"],
    "an unknown proof": ["convert", "good", "out", "--verify", "maybe"],
    "a rename without =": ["convert", "good", "out", "--rename", "x"],
    "a drop that is no expression": ["convert", "good", "out", "--drop", "["],
    "no workers": ["convert", "good", "out", "--workers", "0"],
    "filters that match nothing": ["convert", "good", "out", "--include", "*.nothing"],
    "options that are no JSON": ["convert", "good", "out", "--source-options", "hunter2"],
    "options that are no object": ["convert", "good", "out", "--dest-options", '["hunter2"]'],
    "options in a file that is missing": ["convert", "good", "out", "--dest-options", "@missing.json"],
    "an unknown protocol": ["convert", "good", "nowhere://out"],
    "an unknown command": ["transmogrify"],
    "an unknown option": ["convert", "good", "out", "--colour", "red"],
    "an argument too few": ["convert", "good"],
    "verifying what is missing": ["verify", "missing"],
    "verifying what holds nothing": ["verify", "empty"],
    "inspecting what is missing": ["inspect", "missing.pt"],
    "inspecting a directory": ["inspect", "good"],
}


@pytest.mark.parametrize("words", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_a_wrong_call_is_status_2_one_line_and_nothing_written(
    words: list[str], good_source: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    status, text, problems = run(capsys, *words)
    assert (status, text) == (2, "")
    assert problems.startswith("ptbin: error: ")
    assert problems.count("\n") == 1
    assert "hunter2" not in problems
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_prints_the_plan_and_writes_nothing(source: Path, tmp_path: Path, capsys: Captured) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, text, _ = run(capsys, "convert", source, tmp_path / "out", "--dry-run", "--include", "*/0*.pt")
    assert status == 0
    assert f"run/07.pt -> {tmp_path}/out/run/07.bin" in text
    assert "would convert 10 (" in text
    status, text, _ = run(capsys, "convert", source, tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(text)
    assert status == 1  # the twins would be refused
    assert {problem["reason"] for problem in plan["problems"]} == {"output_collision"}
    assert sorted(tmp_path.rglob("*")) == before
    run(capsys, "convert", source / "run" / "03.pt", tmp_path / "out" / "run" / "03.bin", "-q")
    text = run(capsys, "convert", source, tmp_path / "out", "--dry-run")[1]
    assert "up to date 1" in text


def test_a_fault_of_ours_is_one_line_unless_debugging(
    checkpoint: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(ptbin, "inspect", broken)
    status, text, problems = run(capsys, "inspect", checkpoint)
    assert (status, text, problems.count("\n")) == (1, "", 1)
    assert "surprise" in problems
    assert "Traceback" in run(capsys, "inspect", checkpoint, "--log-level", "debug")[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_whatever_it_comes_out_as(
    number: int, checkpoint: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disturbed(pydantic.BaseModel):
        @pydantic.model_serializer
        def disturb(self) -> str:
            os.kill(os.getpid(), number)
            return "never"

    monkeypatch.setattr(ptbin, "inspect", lambda *_, **__: Disturbed().model_dump())
    status, text, problems = run(capsys, "inspect", checkpoint)
    assert (status, text, problems) == (130, "", "ptbin: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_an_import(
    number: int, checkpoint: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = []

    def slow(*_: object, **__: object) -> None:
        with interrupts_held():
            os.kill(os.getpid(), number)
            through.append(True)
        through.append(False)

    monkeypatch.setattr(ptbin, "inspect", slow)
    assert run(capsys, "inspect", checkpoint) == (130, "", "ptbin: interrupted\n")
    assert through == [True]


def test_storage_options_are_read_from_a_file(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "options.json").write_text('{"key": "hunter2"}')
    status, _, problems = run(
        capsys, "convert", checkpoint, tmp_path / "x.bin", "--dest-options", f"@{tmp_path}/options.json", "-q"
    )
    assert (status, problems) == (0, "")


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31mred\n\x9b") == "a\\x1b[31mred\\n\\x9b"
    assert printable("ümlaut 重み") == "ümlaut 重み"


def test_passwords_in_uris_are_neither_printed_nor_given_to_prefect(
    good_source: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "hunter2" not in printable("cannot read https://me:hunter2@host/x.pt")
    monkeypatch.setattr("ptbin.catalog.checks.check_request", lambda *_, **__: None)
    status, text, problems = run(capsys, "convert", good_source, "https://me:hunter2@host/out")
    assert (status, text) == (2, "")
    assert "storage options" in problems
    assert "hunter2" not in problems


def test_progress_without_a_terminal_is_lines_now_and_then(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("flows.cli.progress.time.monotonic", lambda: now)
    monkeypatch.setattr("flows.cli.progress.Pace", lambda: Pace(lambda: now))
    progress = PlainProgress()
    progress.moved(10)  # before anything is planned there is nothing to compare with
    progress.planned(3, 3 << 20, 7)
    progress.moved(1 << 20)
    now += 6
    progress.moved(1 << 20)
    progress.moved(1 << 20)
    progress.settled(
        Outcome("a", "rejected", "corrupt_archive", "/src/a: cut short", source="/src/a", nbytes=5)
    )
    assert capsys.readouterr().err.splitlines() == [
        "ptbin: 3 files to work on, 3.00 MiB; 7 up to date",
        "ptbin: 0 of 3 files, 0 %, 2.00 MiB moved, 341 KiB/s, 6.0 s",
        "ptbin: rejected a: corrupt_archive: cut short",
    ]


def test_units_and_columns() -> None:
    amounts = [0, 1023, 1024, 1536, 10_000, 1 << 20, 999 << 20, 5 << 30]
    assert [format_nbytes(amount) for amount in amounts] == [
        "0 B", "1023 B", "1.00 KiB", "1.50 KiB", "9.77 KiB", "1.00 MiB", "999 MiB", "5.00 GiB"
    ]  # fmt: skip
    assert align([("a", "1", "x"), ("bbb", "22", "")], right=[1]) == ["  a     1  x", "  bbb  22"]
    assert short_detail("a/b.pt", "s3://x/a/b.pt: cut short") == "cut short"
    assert short_detail("a/b.pt", "cut: short") == "cut: short"
