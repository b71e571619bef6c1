"""The tally's accounting, and the files made of it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptbin.catalog import Job, Problem
from ptbin.runs.outcomes import Converted, Kind, Outcome, StoredFile
from ptbin.runs.record import record_files, sha256sums
from ptbin.runs.run_ids import new_run_id
from ptbin.runs.tally import Tally

KINDS: list[Kind] = ["converted", "not_a_checkpoint", "rejected", "failed"]


def job(path: str, size: int = 10) -> Job:
    return Job(f"/src/{path}", size, f"/out/{path}.bin", path, True, None)


def outcome(path: str, kind: Kind, sha256: str | None = "0" * 64) -> Outcome:
    if kind == "converted":
        stored = StoredFile(f"{path.rsplit('/', 1)[-1]}.bin", 8, sha256)
        return Outcome(path, kind, converted=Converted(f"/out/{path}.bin.manifest.json", (stored,), 3, 9, 8))
    reason = "" if kind == "not_a_checkpoint" else "corrupt_archive"
    return Outcome(path, kind, reason, f"/src/{path}: why")


@given(st.lists(st.sampled_from(KINDS), max_size=30), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_every_checkpoint_is_counted_once(kinds: list[Kind], current: int, collided: int, left: int) -> None:
    tally = Tally("r", "/src", "/out")
    for number, kind in enumerate(kinds):
        tally.add(job(str(number)), outcome(str(number), kind))
    tally.add_all([job(f"c{number}") for number in range(current)], "up_to_date")
    tally.add_all([job(f"l{number}") for number in range(left)], "not_tried")
    tally.add_collisions([Problem(f"/src/p{n}", "output_collision", "two") for n in range(collided)])
    summary = tally.summary(1.0)
    counted = sum(summary[key] for key in ("converted", "up_to_date", "rejected", "failed"))
    assert counted + kinds.count("not_a_checkpoint") + left == len(kinds) + current + collided + left
    assert summary["rejected"] == kinds.count("rejected") + collided
    assert len(summary["problems"]) == summary["rejected"] + summary["failed"]
    assert len(summary["manifests"]) == summary["converted"] == kinds.count("converted")
    assert tally.succeeded == (not summary["problems"] and not left)
    assert tally.message().startswith(
        f"converted {summary['converted']}, up to date {current}, "
        f"rejected {summary['rejected']}, failed {summary['failed']}"
    )


def test_a_run_whose_record_could_not_be_written_has_not_succeeded() -> None:
    tally = Tally("r", "/src", "/out")
    tally.run_problems.append(Problem("/out/_ptbin", "storage_error", "disk full"))
    assert not tally.succeeded
    assert tally.summary(0)["problems"] == [
        {"source": "/out/_ptbin", "reason": "storage_error", "detail": "disk full"}
    ]


@pytest.mark.starts_processes
@pytest.mark.parametrize("name", ["plain", "with space", "back\\slash", "new\nline", "ümlaut", "a/b/deep"])
def test_sha256sum_accepts_the_checksum_list(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    target = out / f"{name}.bin"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"weights")
    tally = Tally("r", "/src", f"{out}/")
    digest = hashlib.sha256(b"weights").hexdigest()
    made = Converted(f"{target}.manifest.json", (StoredFile(target.name, 7, digest),), 1, 0, 0)
    tally.add(job(name), Outcome(name, "converted", converted=made))
    (out / "SHA256SUMS").write_text(sha256sums(tally.entries, tally.dest))
    check = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    assert subprocess.run(check, cwd=out, capture_output=True).returncode == 0
    target.write_bytes(b"weightz")
    assert subprocess.run(check, cwd=out, capture_output=True).returncode == 1


def test_the_record_comes_last_and_a_list_without_lines_not_at_all() -> None:
    tally = Tally("r", "/src", "/out")
    tally.add(job("a"), outcome("a", "rejected"))
    assert list(record_files(tally, tally.summary(1), options={}, flow_run_id=None)) == [
        "report.html",
        "run.json",
    ]
    tally.add(job("b"), outcome("b", "converted"))
    files = record_files(tally, tally.summary(1), options={"format": "torch"}, flow_run_id="f")
    assert list(files) == ["SHA256SUMS", "report.html", "run.json"]
    record = json.loads(files["run.json"])
    assert [row["outcome"] for row in record["checkpoints"]] == ["rejected", "converted"]
    assert record["options"] == {"format": "torch"}


def test_outputs_that_were_not_proven_are_not_in_the_checksum_list() -> None:
    tally = Tally("r", "/src", "/out")
    tally.add(job("a"), outcome("a", "converted", sha256=None))
    assert sha256sums(tally.entries, tally.dest) == ""


def test_the_report_shows_markup_in_names_as_text() -> None:
    tally = Tally("r", "/src", "/out")
    tally.add(job("<script>alert(1)</script>"), outcome("<script>alert(1)</script>", "rejected"))
    page = record_files(tally, tally.summary(1), options={}, flow_run_id=None)["report.html"].decode()
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


def test_run_ids_sort_by_time_and_differ() -> None:
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", new_run_id())
    assert new_run_id() != new_run_id()


def test_runs_within_one_second_sort_as_they_began(monkeypatch: pytest.MonkeyPatch) -> None:
    first = datetime(2026, 11, 26, 16, 30, 9, 999_000, tzinfo=UTC)
    ids = []
    for number in range(4):
        moment = first + timedelta(milliseconds=500 * number)
        clock = type("Clock", (), {"now": staticmethod(lambda _zone, moment=moment: moment)})
        monkeypatch.setattr("ptbin.runs.run_ids.datetime", clock)
        ids.append(new_run_id())
    assert ids == sorted(ids)
