"""What DEST means to each command, and calls by which somebody could lose a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flows.cli.app import run

MINE = b"somebody's own file"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a checkpoint, weights, a folder of checkpoints, a link to it."""
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(40, 3)}, "good.pt")
    torch.save({"w": torch.ones(40, 3)}, "x.bin")
    Path("many").mkdir()
    for name in "ab":
        torch.save({"w": torch.ones(4)}, f"many/{name}.pt")
    Path("link").symlink_to("many")
    return tmp_path


def test_a_suffix_settles_the_format(folder: Path) -> None:
    assert run(["convert", "good.pt", "model.safetensors", "-q"]) == 0
    manifest = json.loads(Path("model.safetensors.manifest.json").read_text())
    assert manifest["options"]["format"] == "safetensors"
    assert run(["convert", "good.pt", "raw.bin", "--format", "raw", "-q"]) == 0
    assert Path("raw.bin.index.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "good.pt", "model.safetensors", "--format", "torch"], "leave --format"),
        (["convert", "good.pt", "model.bin", "--format", "safetensors"], "leave --format"),
        (["convert", "good.pt", "out/x.pt"], "out/x.bin"),
        (["convert", "good.pt", "m.onnx"], "write m.onnx/"),
        (["convert", "good.pt", "-"], "name a file or a directory"),
        (["convert", "many", "out.bin"], "out.bin/"),
        (["convert", "many", "out.pth"], "write out.pth/"),
        (["restore", "x.bin", "y.safetensors"], "ptbin convert"),
        (["restore", "x.bin", "-"], "name a file or a directory"),
        (["sync", "many", "out.bin"], "write out.bin/"),
        (["sync", "many", "-"], "name one"),
        (["migrate", "many", "out.safetensors"], "write out.safetensors/"),
        (["convert", "many/a.pt", "many/b.pt", "x.bin"], "unexpected extra argument"),
        # One side in the other, or both the same.
        (["convert", "many", "many"], "same place"),
        (["convert", "many", "many/out"], "lies inside the source"),
        (["convert", "x.bin", "."], "same file"),
        (["convert", "x.bin", "x.bin", "--force"], "same place"),
        (["restore", "many", "many/out"], "lies inside the source"),
        (["sync", "many", "."], "lies inside the destination"),
        (["migrate", "many", "many/out"], "lie in one another"),
        (["migrate", "many", "many/"], "are the same"),
        (["migrate", "many", "link"], "lie in one another"),
        (["migrate", "link/out", "many"], "lie in one another"),
        (["convert", "many", "link/out"], "lies inside the source"),
    ],
)
def test_calls_that_cannot_be_meant_write_nothing(
    folder: Path, words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _stored(folder)
    assert run(words) == 2
    assert said in capfd.readouterr().err
    assert _stored(folder) == before


@pytest.mark.starts_processes
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("convert many mounted", "same place"),
        ("convert many mounted/out", "lies inside the source"),
        ("sync many/sub mounted", "lies inside the destination"),
        ("migrate many mounted/out", "lie in one another"),
        ("sync many out --delete --backup-dir mounted/old", "lie in one another"),
    ],
)
def test_a_folder_that_is_mounted_twice_is_one(folder: Path, words: str, said: str) -> None:
    Path("mounted").mkdir()
    Path("many/sub").mkdir()
    torch.save({"w": torch.ones(4)}, "many/sub/c.pt")
    apart = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*apart, "mount --bind many mounted"], capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    before = _stored(folder)
    command = f'mount --bind many mounted && exec "{sys.executable}" -P -m ptbin {words}'
    done = subprocess.run([*apart, command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert _stored(folder) == before


def _stored(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dest", ["there.bin", "there.onnx", "new.bin/", "plain"])
def test_a_directory_is_one_whatever_its_name(folder: Path, dest: str) -> None:
    if dest.startswith("there"):
        Path(dest).mkdir()
    assert run(["convert", "good.pt", dest, "-q"]) == 0
    assert (Path(dest) / "good.bin").is_file()


@pytest.mark.parametrize("kind", ["file", "read-only", "hard link", "symbolic link", "link to a link"])
def test_what_lies_at_the_place_of_an_output_stays_until_it_is_forced(
    folder: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where it is the source itself, by another name; that one is never lost."""
    before = Path("good.pt").read_bytes()
    if kind in ("file", "read-only"):
        Path("b.bin").write_bytes(MINE)
        if kind == "read-only":
            Path("b.bin").chmod(0o444)
    elif kind == "hard link":
        os.link("good.pt", "b.bin")
    else:
        target = "good.pt"
        if kind == "link to a link":
            Path("between").symlink_to("good.pt")
            target = "between"
        Path("b.bin").symlink_to(target)
    at_first = Path("b.bin").read_bytes()
    status = run(["convert", "good.pt", "b.bin"])
    said = capfd.readouterr().err
    assert (status, "output_exists" in said) == (1, True) or (status, "same place" in said) == (2, True)
    assert Path("b.bin").read_bytes() == at_first
    run(["convert", "good.pt", "b.bin", "--force", "-q"])
    assert Path("good.pt").read_bytes() == before


def test_a_source_reached_through_a_linked_folder_is_not_lost(folder: Path) -> None:
    before = Path("x.bin").read_bytes()
    Path("linked").symlink_to(".")
    assert run(["convert", "x.bin", "linked/x.bin", "--force"]) == 2
    assert run(["convert", "x.bin", "linked", "--force"]) == 2
    assert Path("x.bin").read_bytes() == before


def test_a_single_dry_run_says_what_the_run_would_do(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("b.bin").write_bytes(MINE)
    assert run(["convert", "good.pt", "b.bin", "--dry-run"]) == 1
    assert "output_exists" in capfd.readouterr().out
    assert run(["convert", "good.pt", "b.bin", "--dry-run", "--force"]) == 0
    assert "(replaces b.bin)" in capfd.readouterr().out
    assert Path("b.bin").read_bytes() == MINE


def test_an_output_that_was_written_over_is_somebody_s(folder: Path) -> None:
    assert run(["convert", "good.pt", "b.bin", "-q"]) == 0
    trained = bytearray(Path("b.bin").read_bytes())
    trained[100] ^= 1
    Path("b.bin").write_bytes(trained)
    torch.save({"w": torch.zeros(40, 3)}, "good.pt")
    assert run(["convert", "good.pt", "b.bin", "-q"]) == 1
    assert Path("b.bin").read_bytes() == trained
