"""A dry run prints the plan that the run carries out: the very files that it writes, replaces and removes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from flows.cli.app import run as command
from flows.convert import convert
from flows.migrate import migrate
from flows.restore import restore
from flows.sync import sync
from ptbin.manifests.manifest import MANIFEST_SUFFIX

pytestmark = [pytest.mark.starts_servers, pytest.mark.usefixtures("server")]

FLOWS: dict[str, Any] = {"convert": convert, "sync": sync, "restore": restore}
Captured = pytest.CaptureFixture[str]
State = dict[str, tuple[int, int]]


class Rehearsal:
    """SOURCE and DEST, a dry run, and the same run."""

    def __init__(self, root: Path, capfd: Captured) -> None:
        self.source, self.dest = root / "in", root / "out"
        self.capfd = capfd
        self.source.mkdir()

    def save(self, name: str, value: Any = 1.0, **more: Any) -> Path:
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {"w": torch.full((64,), value), "b": torch.ones(8)}, **more}, path)
        return path

    def plan(self, name: str, *words: str) -> dict[str, Any]:
        before = self.files()
        self.capfd.readouterr()
        command([name, str(self.source), str(self.dest), "--dry-run", "--json", *words])
        found: dict[str, Any] = json.loads(self.capfd.readouterr().out)
        assert self.files() == before, "a dry run writes nothing"
        return found

    def files(self) -> State:
        """Of DEST, all but the run's own files; what is written anew has another inode or time."""
        found = {}
        for path in self.dest.rglob("*") if self.dest.exists() else ():
            name = path.relative_to(self.dest).as_posix()
            if path.is_file() and not name.startswith("_ptbin/"):
                found[name] = (path.stat().st_ino, path.stat().st_mtime_ns)
        return found

    def check(self, name: str, *words: str, **asked: Any) -> dict[str, Any]:
        """Hold the plan against the run; the plan."""
        plan = self.plan(name, *words)
        before = self.files()
        time.sleep(0.01)  # a file that is written anew has another modification time
        FLOWS[name](source=str(self.source), dest=str(self.dest), return_state=True, **asked)
        after = self.files()
        rows = [row for key in ("convert", "restore", "copy") for row in plan.get(key, ())]
        written = {path for path, state in after.items() if before.get(path) != state}
        expected = {self._beside(row, file) for row in rows for file in row["writes"]}
        assert written == expected
        replaced = {path for path in written & before.keys() if not path.endswith(MANIFEST_SUFFIX)}
        assert replaced == {self._beside(row, file) for row in rows for file in row["replaced"]}
        gone = {self._beside(row, file) for row in rows for file in row["removes"]}
        assert before.keys() - after.keys() == gone | set(plan.get("delete", ()))
        assert all(row["replaces"] == bool(row["replaced"]) for row in rows)
        return plan

    def _beside(self, row: dict[str, Any], file: str) -> str:
        return (Path(row["dest"]).parent / file).relative_to(self.dest).as_posix()


@pytest.fixture
def stage(tmp_path: Path, capfd: Captured) -> Rehearsal:
    stage = Rehearsal(tmp_path, capfd)
    stage.save("run/a.pt")
    stage.save("run/b.pt", 2.0)
    return stage


def paths(rows: list[Any]) -> set[str]:
    return {Path(row["source"] if isinstance(row, dict) else row).name for row in rows}


def damage(path: Path) -> None:
    """One byte, with size and times as they were."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_new_changed_and_foreign_files_of_a_conversion(stage: Rehearsal) -> None:
    stage.save("run/twin.pt")
    stage.save("run/twin.ckpt")
    (stage.source / "run" / "notes").write_text("not a checkpoint")
    torch.save({"state": {}, "param_groups": []}, stage.source / "run" / "optimizer.pt")
    torch.save({"w": torch.ones(4)}, stage.source / "run" / "scheduler.pt")  # a model, for all its name
    plan = stage.check("convert")
    assert paths(plan["convert"]) == {"a.pt", "b.pt", "scheduler.pt"}
    assert (paths(plan["left_alone"]), paths(plan["not_checkpoints"])) == ({"optimizer.pt"}, {"notes"})
    assert paths(plan["problems"]) == {"twin.pt", "twin.ckpt"}
    stage.save("run/a.pt", 3.0)
    stage.save("run/c.pt", 4.0)
    (stage.dest / "run" / "c.bin").write_bytes(b"somebody's")
    plan = stage.check("convert")
    assert paths(plan["convert"]) == {"a.pt"}
    assert paths(plan["up_to_date"]) == {"b.pt", "scheduler.pt"}
    assert {problem["reason"] for problem in plan["problems"]} == {"output_collision", "output_exists"}
    plan = stage.check("convert", "--force", force=True)
    assert paths(plan["convert"]) == {"a.pt", "b.pt", "c.pt", "scheduler.pt"}


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--split"], {"split": True}),
        (["--max-shard-size", "100"], {"max_shard_size": 100}),
        (["--layout", "hf"], {"layout": "hf"}),
        (["--format", "raw", "--provenance"], {"format": "raw", "provenance": True}),
        (["--select", "ema", "--naming", "append"], {"select": ["ema"], "naming": "append"}),
    ],
)
def test_files_that_options_make_of_a_checkpoint(
    stage: Rehearsal, words: list[str], asked: dict[str, Any]
) -> None:
    two = {}
    if asked.keys() & {"split", "select"}:
        two = {"ema": {"w": torch.zeros(64), "b": torch.zeros(8)}}
    for name in ("run/a.pt", "run/b.pt"):
        stage.save(name, 1.0, **two)
    (stage.source / "run" / "config.json").write_text('{"layers": 2}')
    assert len(stage.check("convert", *words, **asked)["convert"]) == 2
    stage.save("run/b.pt", 9.0, **two)
    plan = stage.check("convert", *words, **asked)
    assert paths(plan["convert"]) == {"b.pt"}


def test_shards_of_before_that_go(stage: Rehearsal) -> None:
    stage.check("convert", "--max-shard-size", "100", max_shard_size=100)
    plan = stage.check("convert")
    assert all(len(row["removes"]) == 3 for row in plan["convert"])


def test_a_damaged_output_that_verify_has_noted(stage: Rehearsal) -> None:
    stage.check("convert")
    damage(stage.dest / "run" / "a.bin")
    assert ptbin.verify(stage.dest / "run" / "a.bin.manifest.json", note=True)
    assert paths(stage.check("convert")["convert"]) == {"a.pt"}


def test_named_files_and_those_that_failed(stage: Rehearsal) -> None:
    listed = ["run/a.pt", "run/gone.pt"]
    names = stage.source.parent / "names"
    names.write_text("\n".join(listed))
    plan = stage.check("convert", "--files-from", str(names), files_from=listed)
    assert (paths(plan["convert"]), paths(plan["problems"])) == ({"a.pt"}, {"gone.pt"})
    good = stage.save("run/late.pt").read_bytes()
    (stage.source / "run" / "late.pt").write_bytes(good[:-40])
    convert(source=str(stage.source), dest=str(stage.dest), return_state=True)
    (stage.source / "run" / "late.pt").write_bytes(good)
    plan = stage.check("convert", "--retry-failed", retry_failed="last")
    assert paths(plan["convert"]) == {"late.pt"}


def test_a_mirror_with_all_that_it_may_do(stage: Rehearsal) -> None:
    for name in ("run/README.md", "run/config.json", "old/notes.txt"):
        (stage.source / name).parent.mkdir(exist_ok=True)
        (stage.source / name).write_text(f'{{"name": "{name}"}}')
    stage.save("old/gone.pt")
    stage.check("sync")
    for name in ("old/gone.pt", "old/notes.txt"):
        (stage.source / name).unlink()
    stage.save("run/a.pt", 5.0)
    (stage.source / "run" / "README.md").write_text("anew")
    (stage.dest / "run" / "mine.txt").write_text("somebody's")
    (stage.source / "run" / "mine.txt").write_text("the mirror's")
    backup = str(stage.dest.parent / "backup")
    plan = stage.check("sync", "--delete", "--backup-dir", backup, delete=True, backup_dir=backup)
    assert plan["delete"] == [], "with a problem nothing is deleted"
    (stage.source / "run" / "mine.txt").unlink()
    stage.save("run/a.pt", 6.0)
    plan = stage.check("sync", "--delete", "--backup-dir", backup, delete=True, backup_dir=backup)
    assert set(plan["delete"]) == {"old/gone.bin.manifest.json", "old/gone.bin", "old/notes.txt"}
    saved = {path.relative_to(backup).as_posix() for path in Path(backup).rglob("*") if path.is_file()}
    assert set(plan["back_up"]) <= saved


@pytest.mark.parametrize("immutable", [False, True])
def test_a_mirror_compared_by_content(stage: Rehearsal, immutable: bool) -> None:
    (stage.source / "run" / "README.md").write_text("x")
    stage.check("sync")
    for name in ("run/a.pt", "run/README.md"):
        os.utime(stage.source / name)  # touched: the same content
    damage(stage.dest / "run" / "b.bin")
    words, asked = ["--checksum"], {"checksum": True}
    if immutable:
        words, asked = [*words, "--immutable"], {**asked, "immutable": True}
    assert paths(stage.plan("sync", *words)["convert"]) == (set() if immutable else {"b.pt"})
    # A manifest that only learns of another state of its source is not the plan's.
    before = {name: state for name, state in stage.files().items() if not name.endswith(MANIFEST_SUFFIX)}
    plan = stage.plan("sync", *words)
    sync(source=str(stage.source), dest=str(stage.dest), return_state=True, **asked)
    after = {name: state for name, state in stage.files().items() if not name.endswith(MANIFEST_SUFFIX)}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == (set() if immutable else {"run/b.bin"})
    assert {problem["reason"] for problem in plan["problems"]} == ({"immutable"} if immutable else set())


def test_weights_that_are_restored(stage: Rehearsal, tmp_path: Path) -> None:
    stage.check("convert")
    stage.source, stage.dest = stage.dest, tmp_path / "back"
    assert paths(stage.check("restore")["restore"]) == {"a.bin", "b.bin"}
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pt")
    ptbin.convert(tmp_path / "other.pt", stage.source / "run" / "a.bin")
    ptbin.convert(tmp_path / "other.pt", stage.source / "run" / "c.bin")
    (stage.dest / "run" / "c.pt").write_bytes(b"somebody's")
    plan = stage.check("restore")
    assert (paths(plan["restore"]), paths(plan["up_to_date"])) == ({"a.bin"}, {"b.bin"})
    assert [problem["reason"] for problem in plan["problems"]] == ["output_exists"]


@pytest.mark.parametrize("name", ["convert", "restore"])
def test_one_checkpoint(stage: Rehearsal, capfd: Captured, name: str) -> None:
    suffix = {"convert": "bin", "restore": "pt"}[name]
    source = stage.source / "run" / "a.pt"
    if name == "restore":
        source = stage.source / "run" / "a.bin"
        ptbin.convert(stage.source / "run" / "a.pt", source)
    words = [name, str(source), str(stage.dest / f"x.{suffix}")]
    command([*words, "--dry-run", "--json"])
    (row,) = json.loads(capfd.readouterr().out)[name]
    assert command(words) == 0
    assert stage.files().keys() == set(row["writes"])
    capfd.readouterr()
    command([*words, "--dry-run", "--json"])
    assert json.loads(capfd.readouterr().out)[name] == []


@pytest.mark.parametrize("layout", [None, "hf"])
def test_a_registry_that_is_migrated(tmp_path: Path, capfd: Captured, layout: str | None) -> None:
    source, dest = tmp_path / "models", tmp_path / "dest"

    def save(name: str, value: float) -> None:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"w": torch.full((8,), value)}, source / name)

    def files() -> dict[str, int]:
        found = (path for path in dest.rglob("*") if path.is_file())
        names = {path: path.relative_to(dest).as_posix() for path in found}
        return {
            name: path.stat().st_mtime_ns
            for path, name in names.items()
            if not name.startswith("_ptbin/") and path.name != "registry.json"
        }

    def check(expected: dict[str, str]) -> None:
        words = ["migrate", str(source), str(dest), "--dry-run", "--json"]
        capfd.readouterr()
        command([*words, *(("--layout", layout) if layout else ())])
        rows = json.loads(capfd.readouterr().out)["versions"]
        assert {f"{row['model']}/{row['version']}": row["action"] for row in rows} == expected
        before = files()
        time.sleep(0.01)
        migrate(str(source), str(dest), layout=layout, return_state=True)
        after = files()
        written = {name for name, state in after.items() if before.get(name) != state}
        planned = {
            (row["model"], row["dest_version"], file) for row in rows for file in row.get("writes", ())
        }
        assert written == {f"{model}/{version}/{file}" for model, version, file in planned}

    save("net/1/weights/model.pt", 1.0)
    (source / "net" / "1" / "weights" / "config.json").write_text("{}")
    save("net/2/model.pt", 2.0)
    save("other/1/model.pt", 3.0)
    (source / "other" / "1" / "model.pt").write_bytes(b"damaged")
    check({"net/1": "migrate", "net/2": "migrate", "other/1": "refused"})
    save("net/3/model.pt", 4.0)
    check({"net/1": "up_to_date", "net/2": "up_to_date", "net/3": "migrate", "other/1": "refused"})
