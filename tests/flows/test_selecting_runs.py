"""`--select`, `--flatten`, `--split` from the command line, and over a folder: outputs, reruns, summaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.cli import app
from tests.bits import assert_same_tensors

Captured = pytest.CaptureFixture[str]

LAYER = {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(3)}
GAN: dict[str, Any] = {"generator": LAYER, "discriminator": {"w": torch.zeros(2, 2)}, "losses": torch.rand(9)}


def run(capsys: Captured, *words: str | Path) -> tuple[int, str, str]:
    status = app.run([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def gan(tmp_path: Path) -> Path:
    torch.save(GAN, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_one_checkpoint_split_and_then_up_to_date(gan: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out" / "last.bin"
    status, text, problems = run(capsys, "convert", gan, out, "--split")
    assert (status, problems) == (0, "")
    assert "metrics" in text
    assert_same_tensors(load(tmp_path / "out" / "last.generator.bin"), LAYER)
    assert_same_tensors(load(tmp_path / "out" / "last.discriminator.bin"), GAN["discriminator"])
    assert run(capsys, "convert", gan, out, "--split") == (0, f"{out} is up to date\n", "")
    assert run(capsys, "verify", f"{out}.manifest.json", "--level", "load")[0] == 0
    (tmp_path / "out" / "last.discriminator.bin").unlink()
    assert run(capsys, "verify", f"{out}.manifest.json")[0] == 1
    assert "up to date" not in run(capsys, "convert", gan, out, "--split")[1]
    assert (tmp_path / "out" / "last.discriminator.bin").exists()


def test_one_checkpoint_with_several_paths(gan: Path, tmp_path: Path, capsys: Captured) -> None:
    both: list[str | Path] = ["--select", "generator", "--select", "discriminator"]
    assert run(capsys, "convert", gan, tmp_path / "a.bin", *both)[0] == 0
    assert set(load(tmp_path / "a.bin")) == {"generator.w", "generator.b", "discriminator.w"}
    assert run(capsys, "convert", gan, tmp_path / "a.bin", *both)[1].endswith("is up to date\n")
    # asked for something else, it is made anew
    assert run(capsys, "convert", gan, tmp_path / "a.bin", "--flatten")[0] == 0
    assert run(capsys, "convert", gan, tmp_path / "a.bin", "--select", "generator")[0] == 0
    assert_same_tensors(load(tmp_path / "a.bin"), LAYER)
    status, text, _ = run(capsys, "inspect", gan, *both, "--json")
    assert (status, json.loads(text)["selected"]) == (0, "generator, discriminator")


def test_the_refusal_names_the_ways_out(gan: Path, tmp_path: Path, capsys: Captured) -> None:
    status, _, problems = run(capsys, "convert", gan, tmp_path / "a.bin")
    assert status == 1
    for words in ("ambiguous_state_dict", "generator", "discriminator", "--select", "--flatten", "--split"):
        assert words in problems
    assert run(capsys, "convert", gan, tmp_path / "a.bin", "--split", "--flatten")[0] == 2


@pytest.mark.usefixtures("server")
def test_a_folder_split_and_run_again(tmp_path: Path, capsys: Captured) -> None:
    source, out = tmp_path / "store", tmp_path / "out"
    (source / "run1").mkdir(parents=True)
    torch.save(GAN, source / "run1" / "gan.ckpt")
    torch.save({"model": LAYER}, source / "plain.pt")
    torch.save({"../../../evil": LAYER, "/etc/x": {"w": torch.ones(2)}}, source / "hostile.pt")
    words: list[str | Path] = ["convert", source, f"{out}/", "--split", "--json"]
    status, text, _ = run(capsys, *words)
    assert (status, json.loads(text)["converted"]) == (0, 3)
    made = {path.relative_to(out).as_posix() for path in out.rglob("*.bin")}
    assert made == {
        "run1/gan.generator.bin",
        "run1/gan.discriminator.bin",
        "plain.bin",
        "hostile.evil.bin",
        "hostile.etc.x.bin",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"store", "out"}
    status, text, _ = run(capsys, *words)
    assert (status, json.loads(text)["converted"], json.loads(text)["up_to_date"]) == (0, 0, 3)
    status, text, problems = run(capsys, "verify", out)
    assert status == 0, text + problems
    (out / "run1" / "gan.generator.bin").unlink()
    status, text, _ = run(capsys, *words)
    assert (status, json.loads(text)["converted"], json.loads(text)["up_to_date"]) == (0, 1, 2)
    assert (out / "run1" / "gan.generator.bin").exists()


@pytest.mark.usefixtures("server")
def test_a_part_never_takes_the_place_of_another_output(tmp_path: Path, capsys: Captured) -> None:
    """`gan.pt` split would write `gan.generator.bin`, and so would `gan.generator.pt`: both are refused."""
    source, out = tmp_path / "store", tmp_path / "out"
    source.mkdir()
    torch.save(GAN, source / "gan.pt")
    torch.save({"model": {"w": torch.full((3,), 7.0)}}, source / "gan.generator.pt")
    torch.save({"model": LAYER}, source / "other.pt")
    status, text, _ = run(capsys, "convert", source, f"{out}/", "--split", "--json")
    summary = json.loads(text)
    assert (status, summary["converted"]) == (1, 1)
    assert {problem["reason"] for problem in summary["problems"]} == {"output_collision"}
    assert len(summary["problems"]) == 2
    assert run(capsys, "verify", out)[0] == 0
    status, text, _ = run(capsys, "convert", source, f"{out}/", "--split", "--json", "--naming", "append")
    assert (status, json.loads(text)["converted"]) == (0, 3)
    assert_same_tensors(load(out / "gan.pt.generator.bin"), LAYER)
    assert run(capsys, "verify", out)[0] == 0


@pytest.mark.usefixtures("server")
def test_what_only_has_the_name_of_a_part_is_an_orphan(tmp_path: Path, capsys: Captured) -> None:
    source, out = tmp_path / "store", tmp_path / "out"
    source.mkdir()
    torch.save(GAN, source / "gan.pt")
    assert run(capsys, "convert", source, f"{out}/", "--split", "-q")[0] == 0
    torch.save(LAYER, out / "gan.encoder.bin")
    status, text, _ = run(capsys, "verify", out, "--json")
    assert (status, [issue["reason"] for issue in json.loads(text)["issues"]]) == (1, ["no_manifest"])
