"""The history of a destination, as its run records tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.cli.app import run
from ptbin.errors import UsageError
from ptbin.history.records import HEAD_NBYTES, RecordedRun, iter_runs, parse_head
from ptbin.stores.local import LocalStore
from tests.fakes import CountingStore, registered


def record(dest: Path, run_id: str, **facts: Any) -> None:
    folder = dest / "_ptbin" / "runs" / run_id
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<p>")
    counts = {
        "converted": 1,
        "up_to_date": 2,
        "rejected": 0,
        "failed": 0,
        "seconds": 75.0,
        "read_bytes": 2048,
    }
    whole = {"schema_version": 1, "kind": "convert", "run_id": run_id, "source": "/in", **counts, **facts}
    (folder / "run.json").write_text(json.dumps(whole, indent=2))


def told(dest: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert run(["runs", str(dest), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)["runs"]


def test_the_newest_run_comes_first_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, "20261102T020000Z-aaaa", message="converted 1", succeeded=True)
    record(tmp_path, "20261103T020000Z-0000", rejected=1)
    record(tmp_path, "by-hand", interrupted=True)
    first, second, third = told(tmp_path, capsys)
    assert [first["run_id"], second["run_id"]] == ["20261103T020000Z-0000", "20261102T020000Z-aaaa"]
    assert first["began"] == "2026-11-03T02:00:00Z"
    assert (first["succeeded"], first["rejected"], first["read_bytes"], first["seconds"]) == (
        False,
        1,
        2048,
        75,
    )
    assert (second["succeeded"], second["message"]) == (True, "converted 1")
    assert (third["run_id"], third["began"], third["interrupted"]) == ("by-hand", "", True)
    assert run(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:2]] == ["failed", "ok"]
    assert "1 min 15 s" in lines[0]


def test_a_destination_without_runs_has_none_and_one_that_is_missing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(tmp_path, capsys) == []
    assert run(["runs", str(tmp_path / "nowhere")]) == 2


def test_only_the_runs_that_are_shown_are_read_and_of_each_only_its_beginning(tmp_path: Path) -> None:
    long = [{"path": f"{number:09}.pt"} for number in range(HEAD_NBYTES // 10)]
    for day in range(1, 8):
        record(tmp_path, f"202611{day:02}T020000Z-aaaa", manifests=[], checkpoints=long)
    with registered("counting", CountingStore(LocalStore())) as store:
        runs = list(iter_runs(f"counting://{tmp_path}", last=3))
        assert [found.run_id[6:8] for found in runs] == ["07", "06", "05"]
        assert [found.number("converted") for found in runs] == [1, 1, 1]
        assert (store.count("list"), store.count("open")) == (1, 3)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": 3}', "\x00", '{"run_id": "x', "[" * 100_000])
def test_a_damaged_record_is_shown_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    record(tmp_path, "20261102T020000Z-aaaa")
    (tmp_path / "_ptbin/runs/20261102T020000Z-aaaa/run.json").write_text(text)
    (only,) = told(tmp_path, capsys)
    assert only == {"run_id": "20261102T020000Z-aaaa", "problem": "it is not a run record"}


VALUES = st.integers() | st.text(max_size=6) | st.lists(st.integers(), max_size=3)


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), st.integers(0, 200))
def test_a_record_that_is_cut_anywhere_gives_whole_fields_or_none(facts: dict[str, Any], end: int) -> None:
    text = json.dumps(facts, indent=2)
    found = parse_head(text[:end])
    assert all(facts[name] == value for name, value in found.items())
    assert end < len(text) or found == facts


def test_a_record_of_an_early_version_succeeded_if_its_counts_say_so() -> None:
    assert RecordedRun("r", {"run_id": "r", "rejected": 0, "failed": 0}).succeeded
    assert not RecordedRun("r", {"run_id": "r", "rejected": 0, "failed": 0, "not_tried": 1}).succeeded
    assert not RecordedRun("r", {}, "unreadable").succeeded


def test_a_file_is_no_destination(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(UsageError):
        list(iter_runs(str(tmp_path / "x.bin")))
