"""Stores with entries that are not plain files: none of them stops a run, and nothing is lost unsaid."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.convert import convert
from flows.sync import sync
from flows.verify import verify
from ptbin.runs.run_ids import new_run_id
from tasks.live import Listener, LiveRun, open_live_run

pytestmark = pytest.mark.usefixtures("server")

FLOWS = pytest.mark.parametrize("flow", [convert, sync])


class Notes(Listener):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def run(flow: Any, *places: Path, listener: Listener | None = None, **parameters: Any) -> dict[str, Any]:
    names = ("source", "dest") if len(places) == 2 else ("dest",)
    with open_live_run(LiveRun(new_run_id(), listener=listener or Listener())) as live:
        flow(
            **dict(zip(names, map(str, places), strict=True)),
            **parameters,
            run_id=live.run_id,
            return_state=True,
        )
    return live.summary


def reasons(summary: dict[str, Any]) -> dict[str, str]:
    root = summary["source"]
    return {problem["source"].removeprefix(f"{root}/"): problem["reason"] for problem in summary["problems"]}


@pytest.fixture
def blank(checkpoint: Path) -> bytes:
    """A small checkpoint."""
    return checkpoint.read_bytes()


@pytest.fixture
def store(tmp_path: Path, blank: bytes) -> Path:
    """A good checkpoint with its README, next to it."""
    for name in ("good.pt", "run/last.pt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(blank)
    (tmp_path / "in/run/README.md").write_text("# model")
    return tmp_path / "in"


@FLOWS
def test_names_that_are_no_text_are_one_problem_each(
    store: Path, tmp_path: Path, blank: bytes, flow: Any
) -> None:
    root = os.fsencode(store)
    Path(os.fsdecode(root + b"/bad\xff.pt")).write_bytes(blank)
    (store / "two\nlines.pt").write_bytes(blank)
    for name in (b"a.pt", b"b.pt", b"notes"):
        folder = Path(os.fsdecode(root + b"/folder\xfe"))
        folder.mkdir(exist_ok=True)
        (folder / os.fsdecode(name)).write_bytes(blank)
    summary = run(flow, store, tmp_path / "out")
    assert reasons(summary) == {
        "bad\\xff.pt": "unsafe_path",
        "two\\nlines.pt": "unsafe_path",
        "folder\\xfe/": "unsafe_path",
    }
    assert summary["converted"] == 2
    record = json.loads(Path(summary["record"], "run.json").read_text())
    assert record["rejected"] == 3
    excluded = run(flow, store, tmp_path / "out", exclude=["bad*", "two*", "folder*"])
    assert not excluded["problems"]


def test_a_companion_whose_name_is_no_text_is_a_problem(store: Path, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(store) + b"/conf\xff.json")).write_text("{}")
    (store / "two\nlines.json").write_text("{}")
    summary = run(sync, store, tmp_path / "out")
    assert set(reasons(summary).values()) == {"unsafe_path"}
    assert len(reasons(summary)) == 2


def test_a_git_lfs_pointer_among_companions_is_reported(store: Path, tmp_path: Path) -> None:
    (store / "run/tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    summary = run(sync, store, tmp_path / "out")
    assert reasons(summary) == {"run/tokenizer.json": "unsupported_format"}
    assert "git lfs pull" in summary["problems"][0]["detail"]
    assert not (tmp_path / "out/run/tokenizer.json").exists()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def test_a_pointer_next_to_weights_stops_the_model_that_it_would_go_along_with(
    store: Path, tmp_path: Path
) -> None:
    (store / "run/tokenizer.json").write_bytes(POINTER)
    summary = run(convert, store, tmp_path / "out", layout="hf", naming="append")
    assert reasons(summary) == {"run/last.pt": "unsupported_format"}
    assert "git lfs pull" in summary["problems"][0]["detail"]
    assert not list((tmp_path / "out/run").rglob("*"))
    (store / "run/tokenizer.json").write_bytes(b"{}")
    assert run(convert, store, tmp_path / "out", layout="hf", naming="append")["succeeded"]
    assert (tmp_path / "out/run/last.pt/tokenizer.json").read_bytes() == b"{}"


@FLOWS
def test_a_folder_that_cannot_be_read_is_one_problem(
    store: Path, tmp_path: Path, closed: Callable[[Path], None], flow: Any
) -> None:
    closed(store / "lost+found")
    summary = run(flow, store, tmp_path / "out")
    assert reasons(summary) == {"lost+found": "storage_error"}
    assert (summary["converted"], summary["failed"]) == (2, 1)
    assert not run(flow, store, tmp_path / "out", exclude=["lost+found/**"])["problems"]
    assert not run(flow, store, tmp_path / "out", exclude=["lost+found"])["problems"]


def test_a_destination_on_a_disk_of_its_own(
    store: Path, tmp_path: Path, closed: Callable[[Path], None]
) -> None:
    closed(tmp_path / "out/lost+found")
    assert run(convert, store, tmp_path / "out")["succeeded"]
    assert run(verify, tmp_path / "out")["succeeded"]
    closed(tmp_path / "out/run2")
    (issue,) = run(verify, tmp_path / "out")["issues"]
    assert issue["reason"] == "storage_error"
    assert issue["uri"].endswith("/run2")


def test_what_is_converted_is_verified(store: Path, tmp_path: Path, blank: bytes) -> None:
    for name in (
        "wide\u3000space.pt",
        "narrow\u202fspace.pt",
        "family \U0001f468\u200d\U0001f469.pt",
        "-x.pt",
    ):
        (store / name).write_bytes(blank)
    assert run(convert, store, tmp_path / "out")["converted"] == 6
    assert run(verify, tmp_path / "out")["proven"] == 6
    assert run(convert, store, tmp_path / "out")["up_to_date"] == 6


@FLOWS
def test_hidden_entries_pipes_and_links_are_passed_over_and_counted(
    store: Path, tmp_path: Path, blank: bytes, flow: Any
) -> None:
    for name in (".git/a.pt", ".git/b.pt", "run/.ipynb_checkpoints/last-checkpoint.pt", ".hidden.pt"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(blank)
    (store / "run/.gitattributes").write_text("*")
    os.mkfifo(store / "pipe.pt")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(store)  # a socket's name may have 108 bytes
        server.bind("socket.pt")
    os.chdir(tmp_path)
    (store / "dangling.pt").symlink_to("nowhere")
    summary = run(flow, store, tmp_path / "out")
    assert summary["succeeded"]
    assert summary["converted"] == 2
    assert summary["skipped"] == {"hidden": 4, "special_file": 2, "dangling_link": 1}
    record = json.loads(Path(summary["record"], "run.json").read_text())
    assert record["skipped"] == summary["skipped"]
    assert not list((tmp_path / "out").glob(".[!p]*"))
    asked = {convert: ["**/.git/**", "**/*.pt"], sync: [".git/**"]}[flow]
    assert run(flow, store, tmp_path / "out", include=asked)["converted"] == 2
    excluded = run(flow, store, tmp_path / "out", exclude=[".git", "**/.ipynb_checkpoints/**", "[!gl]*.pt"])
    assert excluded["skipped"] == {"hidden": 1}  # .gitattributes


@FLOWS
def test_links_out_of_source_are_followed_when_asked(
    store: Path, tmp_path: Path, blank: bytes, flow: Any
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.pt").write_bytes(blank)
    (store / "folder").symlink_to(tmp_path / "elsewhere")
    (store / "file.pt").symlink_to(tmp_path / "elsewhere/x.pt")
    (store / "inside.pt").symlink_to("good.pt")
    notes = Notes()
    summary = run(flow, store, tmp_path / "out", listener=notes)
    assert (summary["converted"], summary["skipped"]) == (3, {"outside_link": 2})
    assert "file.pt, folder" in notes.texts[0]
    assert "--copy-links" in notes.texts[0]
    summary = run(flow, store, tmp_path / "out", copy_links=True)
    assert (summary["converted"], summary["skipped"]) == (2, {})


def test_a_mirror_deletes_nothing_that_a_link_may_have_led_to(
    store: Path, tmp_path: Path, blank: bytes
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.pt").write_bytes(blank)
    (store / "linked").symlink_to(tmp_path / "elsewhere")
    assert run(sync, store, tmp_path / "out", copy_links=True)["converted"] == 3
    assert run(sync, store, tmp_path / "out", delete=True)["deleted"] == 0
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    assert run(sync, store, tmp_path / "out", delete=True)["deleted"] == 0
    (store / "linked").unlink()
    assert run(sync, store, tmp_path / "out", delete=True)["deleted"] == 2


def test_the_command_line_says_what_was_passed_over(
    store: Path, tmp_path: Path, blank: bytes, ptbin: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (store / ".git").mkdir()
    (store / "link.pt").symlink_to("/nowhere/else.pt")
    (store / "out.pt").symlink_to(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(blank)
    ran = ptbin("convert", store, tmp_path / "out", "--dry-run")
    assert ran.returncode == 0
    assert "1 hidden, 1 link that leads nowhere, 1 link that leads out of SOURCE" in ran.stdout
    ran = ptbin("convert", store, tmp_path / "out", "--dry-run", "--json", "--copy-links")
    assert json.loads(ran.stdout)["skipped"] == {"hidden": 1, "dangling_link": 1}
