"""Each file of a mirror has one owner, and the plan is what the run does."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import time
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from flows.cli.app import run as command
from tests.mirrors import COMPANIONS, ON_BOTH, OUTPUTS, Capture, Mirror, mirror, ptbin
from tests.servers.fixtures import moto_s3

__all__ = ["mirror", "moto_s3", "ptbin"]

pytestmark = pytest.mark.usefixtures("server")


# ------------------------------------------------------------------------------ one file, one owner


def _verify(mirror: Mirror, ptbin: Callable[..., subprocess.CompletedProcess[str]]) -> int:
    options = json.dumps(mirror.options)
    return ptbin("verify", f"{mirror.root}/dest", "--dest-options", options, "--json").returncode


@ON_BOTH
def test_in_layout_hf_an_edited_configuration_costs_one_copy_and_all_stays_proven(
    mirror: Mirror, ptbin: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    mirror.put("t5/pytorch_model.bin", mirror.blank)
    mirror.put("t5/config.json", b'{"layers": 5}')
    assert mirror.sync(layout="hf") == {"converted": 3, "copied": 6}
    assert mirror.files() == {
        "bert/config.json", "bert/tokenizer.model", "bert/step1/config.json", "bert/step1/tokenizer.model",
        "bert/step1/pytorch_model.bin", "bert/step1/pytorch_model.bin.manifest.json",
        "gpt/README.md", "gpt/last/pytorch_model.bin", "gpt/last/pytorch_model.bin.manifest.json",
        "t5/config.json", "t5/pytorch_model.bin", "t5/pytorch_model.bin.manifest.json",
    }  # fmt: skip
    assert mirror.sync(layout="hf") == {"up_to_date": 9}
    time.sleep(0.01)
    mirror.put("t5/config.json", b'{"layers": 6}')
    mirror.put("bert/config.json", b'{"layers": 7}')
    assert mirror.sync(layout="hf") == {"copied": 3, "up_to_date": 6}
    assert mirror.read("bert/step1/config.json") == b'{"layers": 7}'
    assert _verify(mirror, ptbin) == 0
    mirror.drop("bert/config.json")
    assert mirror.sync(layout="hf", delete=True) == {"up_to_date": 7, "deleted": 2}


def test_what_convert_took_along_becomes_the_mirrors(
    mirror: Mirror, ptbin: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    mirror.put("t5/pytorch_model.bin", mirror.blank)
    mirror.put("t5/config.json", b'{"layers": 5}')
    options = json.dumps(mirror.options)
    places = (f"{mirror.root}/source", f"{mirror.root}/dest")
    both = ("--source-options", options, "--dest-options", options)
    exclude = ("--exclude", "tokenizer.model")
    assert ptbin("convert", *places, "--layout", "hf", *exclude, *both).returncode == 0
    assert "t5/config.json" in mirror.files()
    mirror.sync(layout="hf")
    assert mirror.read("t5/config.json") == b'{"layers": 5}'
    manifest = json.loads(mirror.read("t5/pytorch_model.bin.manifest.json"))
    assert [output["path"] for output in manifest["outputs"]] == ["pytorch_model.bin"]
    assert mirror.sync(layout="hf") == {"up_to_date": 9}
    assert _verify(mirror, ptbin) == 0


@pytest.mark.parametrize(
    ("name", "wishes"),
    [
        ("last.bin.index.json", {"format": "raw"}),
        ("last.bin.index.json", {"max_shard_size": 1}),
        ("last.bin.intoto.json", {"provenance": True}),
    ],
)
def test_a_companion_never_takes_the_place_of_a_file_of_an_output(
    mirror: Mirror, name: str, wishes: dict[str, Any]
) -> None:
    mirror.put(f"gpt/{name}", b"{}")
    counts = mirror.sync(**wishes)
    assert (counts["converted"], counts["copied"], counts["rejected"]) == (2, 3, 1)
    assert mirror.reasons() == ["output_collision"]
    assert mirror.read(f"gpt/{name}") != b"{}"


def test_outputs_that_may_be_each_others_shards_are_both_refused(mirror: Mirror) -> None:
    mirror.put("gpt/last-00001-of-00002.pt", mirror.blank)
    counts = mirror.sync(max_shard_size=1)
    assert (counts["converted"], counts["rejected"]) == (1, 2)
    assert mirror.reasons() == ["output_collision"] * 2
    assert mirror.sync()["converted"] == 3  # nothing is cut
    assert mirror.sync(naming="append", max_shard_size=1)["converted"] == 3


# ---------------------------------------------------------------------------------------- --include


def test_include_copies_what_is_no_checkpoint_whatever_it_is_called(mirror: Mirror) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("data/train.csv", "1,2,3")
    scheduler = pickle.dumps({"last_epoch": 3, "base_lrs": [0.1]}, protocol=2)
    mirror.put("gpt/data.zip", archive.getvalue())
    mirror.put("gpt/scheduler.pt", scheduler)
    mirror.put("gpt/noext", b"plain")
    mirror.put("gpt/empty.pt", b"")
    include = ["gpt/*"]
    assert mirror.sync(include=include) == {"converted": 2, "copied": 7}
    assert mirror.read("gpt/scheduler.pt") == scheduler
    assert mirror.files() == OUTPUTS | COMPANIONS | {
        "gpt/data.zip", "gpt/scheduler.pt", "gpt/noext", "gpt/empty.pt",
    }  # fmt: skip
    assert mirror.sync(include=include) == {"up_to_date": 9}
    mirror.drop("gpt/data.zip")
    assert mirror.sync(include=include, delete=True) == {"up_to_date": 8, "deleted": 1}


def test_include_converts_what_is_a_checkpoint_and_refuses_a_broken_one(mirror: Mirror) -> None:
    mirror.put("gpt/broken.pt", mirror.blank[:-50])
    assert mirror.sync(include=["*.ckpt", "*.pt"]) == {"converted": 2, "copied": 3, "rejected": 1}
    assert mirror.files() == OUTPUTS | COMPANIONS


# ----------------------------------------------------------------------------------------- the plan


def _plan(mirror: Mirror, capfd: Capture, *arguments: str) -> dict[str, Any]:
    options = json.dumps(mirror.options)
    places = (f"{mirror.root}/source", f"{mirror.root}/dest")
    both = ("--source-options", options, "--dest-options", options)
    capfd.readouterr()
    command(["sync", *places, "--dry-run", "--json", *arguments, *both])
    plan: dict[str, Any] = json.loads(capfd.readouterr().out)
    return plan


@ON_BOTH
def test_the_plan_is_what_the_run_does(mirror: Mirror, capfd: Capture) -> None:
    mirror.sync()
    time.sleep(0.01)
    mirror.drop("gpt/last.ckpt")
    mirror.drop("gpt/README.md")
    mirror.put("bert/config.json", b'{"layers": 8}')
    backup = f"{mirror.root}/backup"
    gone = {"gpt/last.bin.manifest.json", "gpt/last.bin", "gpt/README.md"}
    plan = _plan(mirror, capfd, "--delete", "--backup-dir", backup)
    assert set(plan["delete"]) == gone
    assert set(plan["back_up"]) == gone | {"bert/config.json"}
    too_few = _plan(mirror, capfd, "--delete", "--max-delete", "1")
    assert (too_few["delete"], sorted(too_few["keep"])) == ([], ["gpt/README.md", "gpt/last.bin"])
    assert [problem["reason"] for problem in too_few["problems"]] == ["max_delete"]
    before = mirror.files()
    mirror.sync(delete=True, backup_dir=backup)
    assert before - mirror.files() == gone
    assert mirror.files("backup") == set(plan["back_up"])


@pytest.mark.parametrize(
    "arguments",
    [("--backup-dir", "{root}/dest/old", "--dry-run"), ("--backup-dir", "{root}/source/../dest")],
)
def test_a_plan_is_refused_where_the_run_would_be(
    mirror: Mirror, capfd: Capture, arguments: tuple[str, ...]
) -> None:
    given = [argument.format(root=mirror.root) for argument in arguments]
    assert command(["sync", f"{mirror.root}/source", f"{mirror.root}/dest", *given]) == 2
    assert "lie in one another" in capfd.readouterr().err


def test_a_secret_in_source_is_not_printed(capfd: Capture) -> None:
    assert command(["sync", "s3://AKIAEXAMPLE:hunter2@bucket/x", "out", "--dry-run"]) == 2
    printed = capfd.readouterr()
    assert "hunter2" not in printed.out + printed.err


def test_a_dry_run_prints_the_plan_and_writes_nothing(mirror: Mirror, capfd: Capture) -> None:
    mirror.sync()
    before = mirror.files()
    mirror.put("bert/step2.pt", mirror.blank)
    mirror.drop("gpt/README.md")
    plan = _plan(mirror, capfd, "--delete")
    assert [item["dest"] for item in plan["convert"]] == [f"{mirror.root}/dest/bert/step2.bin"]
    assert plan["copy"] == []
    assert plan["delete"] == ["gpt/README.md"]
    assert plan["up_to_date"] == 4
    assert mirror.files() == before
