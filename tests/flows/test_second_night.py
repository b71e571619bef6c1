"""What a run takes from earlier ones: acknowledged failures, what to try again, and lists of files."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from click.testing import CliRunner

from flows.cli import app
from flows.cli.app import cli
from flows.convert import convert
from flows.parsing import parse_share
from flows.sync import sync
from ptbin.catalog.named import NamedFiles, parse_lines
from ptbin.errors import UsageError
from ptbin.runs.run_ids import new_run_id
from tasks.live import LiveRun, open_live_run

REASONS = {"hostile.pkl": "unsafe_pickle", "truncated.pt": "corrupt_archive"}
pytestmark = pytest.mark.usefixtures("server")


def run(source: Path, dest: Path, flow: Any = convert, **parameters: Any) -> tuple[Any, dict[str, Any]]:
    with open_live_run(LiveRun(new_run_id())) as live:
        state = flow(source=str(source), dest=str(dest), run_id=live.run_id, return_state=True, **parameters)
    return state, live.summary


def acknowledge(dest: Path, *paths: str) -> None:
    words = ["acknowledge", str(dest), *paths, "--reason", "issue 412", "--until", "2999-12-31"]
    assert app.run([*words, "--quiet"]) == 0


def names(rows: list[dict[str, Any]]) -> set[str]:
    return {Path(row["source"]).name for row in rows}


def test_acknowledged_failures_are_listed_and_make_no_run_fail(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, summary = run(source, out)
    assert first.is_failed()
    assert (summary["new"], summary["rejected"], summary["known"]) == (4, 4, 0)
    acknowledge(out, "hostile.pkl", "truncated.pt", "twin.pt", "twin.ckpt")
    state, summary = run(source, out)
    assert state.is_completed()
    assert state.message == (
        "converted 0, up to date 12, rejected 0, failed 0, known failures 4, not checkpoints 1"
    )
    assert (summary["problems"], summary["known"]) == ([], 4)
    assert names(summary["known_problems"]) == {*REASONS, "twin.pt", "twin.ckpt"}
    record = json.loads((out / "_ptbin/runs" / summary["run_id"] / "run.json").read_text())
    assert record["by_reason"]["known"] == {"corrupt_archive": 1, "output_collision": 2, "unsafe_pickle": 1}
    # A changed source is tried again by itself, and is new; what is mended is resolved.
    (source / "truncated.pt").write_bytes((source / "twin.pt").read_bytes()[:-50])
    (source / "hostile.pkl").unlink()
    state, summary = run(source, out)
    assert state.is_failed()
    assert names(summary["problems"]) == {"truncated.pt"}
    assert (summary["new"], summary["resolved"], summary["known"]) == (1, 1, 2)


def test_a_dry_run_knows_what_is_acknowledged(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It exits as the run will, and lists what the run will delete; collisions need no look at a file."""
    out = tmp_path / "out"
    run(source, out, sync)
    (source / "run/00.pt").unlink()
    words = ["sync", str(source), str(out), "--delete", "--dry-run"]
    capsys.readouterr()
    assert app.run([*words, "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert (names(plan["problems"]), plan["known_problems"]) == ({"twin.pt", "twin.ckpt"}, [])
    assert plan["delete"] == []
    acknowledge(out, *REASONS, "twin.pt", "twin.ckpt")
    assert app.run([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["problems"], names(plan["known_problems"])) == ([], {"twin.pt", "twin.ckpt"})
    assert app.run(words) == 0
    assert "refused 0, known failures 2" in capsys.readouterr().out
    state, _ = run(source, out, sync, delete=True)
    assert state.is_completed()
    assert plan["delete"] == ["run/00.bin.manifest.json", "run/00.bin"]
    assert not any((out / path).exists() for path in plan["delete"])
    # Where the list is damaged, the run fails and deletes nothing.
    (out / "_ptbin/known.json").write_text("{")
    assert app.run([*words, "--json"]) == 1
    assert "known.json" in json.loads(capsys.readouterr().out)["problems"][0]["detail"]


def test_a_damaged_list_of_what_is_known_makes_the_run_fail_and_is_kept(
    good_source: Path, tmp_path: Path
) -> None:
    known = tmp_path / "out/_ptbin/known.json"
    known.parent.mkdir(parents=True)
    known.write_text("{")
    state, summary = run(good_source, tmp_path / "out")
    assert state.is_failed()
    assert summary["converted"] == 6
    assert "known.json" in summary["problems"][0]["detail"]
    assert known.read_text() == "{"


def test_enough_may_be_enough_but_nothing_is_deleted_then(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    state, _ = run(source, out, min_success=0.76)
    assert state.is_failed()
    state, _ = run(source, out, min_success=0.75)
    assert state.is_completed()
    assert "75.00% went well" in state.message
    (source / "run/00.pt").unlink()
    state, summary = run(source, out, sync, delete=True, min_success=0.5)
    assert state.is_completed()
    assert (summary["deleted"], (out / "run/00.bin").exists()) == (0, True)
    acknowledge(out, *REASONS, "twin.pt", "twin.ckpt")
    state, summary = run(source, out, sync, delete=True)
    assert state.is_completed()
    assert (summary["known"], (out / "run/00.bin").exists()) == (4, False)


def test_only_what_failed_is_tried_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, first = run(source, out)
    (source / "truncated.pt").write_bytes((source / "twin.pt").read_bytes())
    (source / "run/new.pt").write_bytes((source / "twin.pt").read_bytes())
    _, summary = run(source, out, retry_failed="last")
    assert (summary["converted"], summary["up_to_date"], summary["rejected"]) == (1, 0, 3)
    assert summary["resolved"] == 1
    _, summary = run(source, out, retry_failed=first["run_id"])
    assert (summary["converted"], summary["up_to_date"], summary["rejected"]) == (0, 1, 3)
    for name in ("hostile.pkl", "twin.ckpt"):
        (source / name).unlink()
    state, summary = run(source, out, retry_failed="last")  # gone is gone, and no failure
    assert state.is_completed()
    assert (summary["converted"], summary["up_to_date"]) == (1, 0)
    _, summary = run(source, out)
    assert (summary["converted"], summary["resolved"]) == (1, 2)
    state, summary = run(source, out, retry_failed="last")
    assert state.is_completed()
    assert summary["converted"] == summary["up_to_date"] == 0
    with pytest.raises(UsageError, match="no run nowhere"):
        run(source, out, retry_failed="nowhere")[0].result()


def test_only_named_files_are_looked_at(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    listed = tmp_path / "list.txt"
    listed.write_text("run/00.pt\n\n./run/01.pt\r\nrun/nowhere.pt\n../secret.pt\n")
    state, summary = run(source, out, files_from=str(listed))
    assert state.is_failed()
    assert summary["converted"] == 2
    assert [(row["reason"], row["source"]) for row in summary["problems"]] == [
        ("storage_error", f"{source}/../secret.pt"),
        ("storage_error", f"{source}/run/nowhere.pt"),
    ]
    state, summary = run(source, out, files_from=["run/00.pt", "run/02.pt"])
    assert (state.is_completed(), summary["converted"], summary["up_to_date"]) == (True, 1, 1)
    # What was not looked at is as it was; what a whole run does not find is gone.
    _, summary = run(source, out)
    assert (summary["converted"], summary["resolved"]) == (9, 2)
    for contradiction in ({"include": ["*.pt"]}, {"retry_failed": "last"}):
        with pytest.raises(UsageError, match="only one of"):
            run(source, out, files_from=["run/00.pt"], **contradiction)[0].result()


def test_a_dry_run_shows_what_a_list_comes_to(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["convert", str(source), str(tmp_path / "out"), "--dry-run", "--json"]

    class Stdin:
        buffer = io.BytesIO(b"run/03.pt\nnowhere.pt\n")

    monkeypatch.setattr("sys.stdin", Stdin)
    assert app.run([*words, "--files-from", "-"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert [Path(row["source"]).name for row in plan["convert"]] == ["03.pt"]
    assert names(plan["problems"]) == {"nowhere.pt"}
    assert app.run([*words, "--retry-failed"]) == 0
    assert json.loads(capsys.readouterr().out)["convert"] == []
    assert app.run([*words, "--files-from", str(tmp_path / "missing.txt")]) == 2
    one = ["convert", str(source / "run/00.pt"), str(tmp_path / "x.bin")]
    assert app.run([*one, "--files-from", str(source / "notes")]) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--retry-failed", "in", "out"],
        ["in", "out", "--retry-failed"],
        ["--retry-failed", "last", "in", "out"],
        ["--retry-failed", "20261126T010203Z-0123abcd", "in", "out"],
        ["in", "--retry-failed=by-hand", "out"],
    ],
)
def test_the_run_to_try_again_may_be_left_out(words: list[str]) -> None:
    with cli.commands["convert"].make_context("convert", list(words)) as context:
        assert (context.params["source"], context.params["dest"]) == ("in", "out")
        expected = next((word for word in words if word.startswith("2026")), "last")
        assert context.params["retry_failed"] == ("by-hand" if "=" in "".join(words) else expected)


def test_a_part_stands_for_its_checkpoint_and_lines_are_taken_as_they_are() -> None:
    files = NamedFiles(parse_lines(b"a b.pt\n#c.pt\r\n\nrun/model-00002-of-00002.bin\nd/\n\xff.pt"))
    assert files.takes("run/model.bin.index.json", "run/model-00002-of-00002.bin")
    assert files.takes("a b.pt")
    assert files.takes("#c.pt")
    assert not files.takes("e.pt")
    assert files.takes("d")
    assert [problem.source for problem in files.missing("s3://b/")] == ["s3://b/\\xff.pt"]


@pytest.mark.parametrize("command", ["runs", "status", "acknowledge", "metrics"])
def test_help_has_examples(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert (result.exit_code, "Examples:" in result.output) == (0, True)


def test_a_report_leads_to_the_run_before_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ids = []
    for _ in range(3):
        _, summary = run(source, out)
        ids.append(summary["run_id"])
    folder = out / "_ptbin/runs" / ids[-1]
    record = json.loads((folder / "run.json").read_text())
    assert record["previous_run"] == ids[1]
    assert [row["run_id"] for row in record["history"]] == ids[:2]
    assert (record["source_uri"], record["dest_uri"]) == (str(source), str(out))
    assert record["version"]
    page = (folder / "report.html").read_text()
    assert (folder / f"../{ids[1]}/report.html").is_file()
    assert f'href="../{ids[1]}/report.html"' in page
    first = (out / "_ptbin/runs" / ids[0] / "report.html").read_text()
    links = re.findall(r'href="(\.\./\.\./[^"]+)"', first)
    assert links
    assert all((folder / unquote(link)).is_file() for link in links)


def test_a_report_warns_of_what_was_extracted_from_an_unsafe_pickle(tmp_path: Path) -> None:
    import pickle

    import torch

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, ("true",))

    source = tmp_path / "in"
    source.mkdir()
    torch.save({"state_dict": {"w": torch.zeros(3)}, "extra": Harm()}, source / "a.pt", pickle_module=pickle)
    _, summary = run(source, tmp_path / "out", on_unsafe="extract")
    folder = tmp_path / "out/_ptbin/runs" / summary["run_id"]
    (row,) = json.loads((folder / "run.json").read_text())["checkpoints"]
    assert (row["outcome"], row["verdict"]) == ("converted", "unsafe")
    assert "Unsafe pickles" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("text", "share"), [("0.99", 0.99), ("99%", 0.99), (" 1", 1.0), ("100 %", 1.0)])
def test_a_share_may_be_written_in_percent(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["99", "0", "-1", "101%", "nan", "most"])
def test_what_is_no_share_is_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["convert", "in", "out", "--min-success", text]) == 2
    assert f"'{text}' is not a share, such as 0.99 or 99%" in capsys.readouterr().err
