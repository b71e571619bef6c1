"""Mirrors: what goes along, what a second run does, what is deleted and what never is.

On files; on S3 as well (`ON_BOTH`) where more of a store is asked than what the contract of stores holds
(`tests/contract`): marks of the content, deleting, copies inside the store, the two sides' options.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run as command
from flows.prefect.orchestrator import Orchestrator
from flows.sync import sync
from ptbin.errors import UsageError
from ptbin.runs.record import new_run_id
from ptbin.stores import Store, open_store
from tasks.live import LiveRun, open_live_run
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import moto_s3

__all__ = ["moto_s3"]

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture
def ptbin(
    ptbin: Callable[..., subprocess.CompletedProcess[str]], server: Orchestrator
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line on the session's server: one of its own would cost each call ten seconds."""
    return functools.partial(ptbin, PREFECT_API_URL=server.api_url)


@dataclass
class Mirror:
    """SOURCE with two models and their companions, DEST empty, a place for backups."""

    root: str
    options: dict[str, Any]
    blank: bytes
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.put("bert/step1.pt", self.blank)
        self.put("bert/config.json", b'{"layers": 2}')
        self.put("bert/tokenizer.model", b"sentence pieces")
        self.put("gpt/last.ckpt", self.blank)
        self.put("gpt/README.md", b"# gpt")
        self.put("gpt/figures/loss.png", b"png")

    def place(self, name: str) -> tuple[Store, str]:
        return open_store(f"{self.root}/{name}", self.options)

    def put(self, path: str, data: bytes, name: str = "source") -> None:
        store, folder = self.place(name)
        store.write_bytes(f"{folder}/{path}", data)

    def drop(self, path: str) -> None:
        store, folder = self.place("source")
        store.delete(f"{folder}/{path}")

    def files(self, name: str = "dest") -> set[str]:
        store, folder = self.place(name)
        return {item.path for item in store.iter_objects(folder) if not item.path.startswith("_ptbin/")}

    def read(self, path: str, name: str = "dest") -> bytes:
        store, folder = self.place(name)
        return store.read_bytes(f"{folder}/{path}")

    def forget(self) -> None:
        """Lose the index of finished work."""
        store, folder = self.place("dest")
        for item in list(store.iter_objects(f"{folder}/_ptbin/index")):
            store.delete(f"{folder}/_ptbin/index/{item.path}")

    def sync(self, source: str = "source", **parameters: Any) -> dict[str, Any]:
        """The summary's counts that are not zero."""
        with open_live_run(LiveRun(new_run_id(), self.options, self.options)) as live:
            state = sync(
                f"{self.root}/{source}",
                f"{self.root}/dest",
                run_id=live.run_id,
                return_state=True,
                **parameters,
            )
        if "message" not in live.summary:
            error = state.result(raise_on_failure=False)
            assert isinstance(error, Exception)
            raise error
        self.summary = live.summary
        names = "converted copied up_to_date rejected failed deleted backed_up kept".split()
        assert live.summary["succeeded"] == state.is_completed()
        return {name: live.summary[name] for name in names if live.summary[name]}

    def reasons(self) -> list[str]:
        return sorted(problem["reason"] for problem in self.summary["problems"])


ON_BOTH = pytest.mark.parametrize("mirror", ["files", "s3"], indirect=True)


@pytest.fixture
def mirror(request: pytest.FixtureRequest, tmp_path: Path, _blank: bytes) -> Mirror:
    if getattr(request, "param", "files") == "files":
        return Mirror(str(tmp_path), {}, _blank)
    endpoint: S3Endpoint = request.getfixturevalue("moto_s3")
    return Mirror(f"s3://{endpoint.make_bucket()}/m", endpoint.storage_options, _blank)


OUTPUTS = {"bert/step1.bin", "bert/step1.bin.manifest.json", "gpt/last.bin", "gpt/last.bin.manifest.json"}
COMPANIONS = {"bert/config.json", "bert/tokenizer.model", "gpt/README.md"}


@ON_BOTH
def test_a_mirror_has_weights_and_companions_and_the_second_run_does_nothing(mirror: Mirror) -> None:
    assert mirror.sync() == {"converted": 2, "copied": 3}
    assert mirror.files() == OUTPUTS | COMPANIONS
    assert mirror.read("bert/config.json") == b'{"layers": 2}'
    assert mirror.sync() == {"up_to_date": 5}
    assert mirror.summary["written_bytes"] == 0


def test_configurations_say_what_the_cast_weights_are(mirror: Mirror) -> None:
    mirror.put("bert/config.json", b'{"layers": 2, "torch_dtype": "float32"}')
    assert mirror.sync(dtype="float16") == {"converted": 2, "copied": 3}
    assert mirror.read("bert/config.json") == b'{"layers": 2, "torch_dtype": "float16"}'
    record = json.loads(mirror.read(f"_ptbin/runs/{mirror.summary['run_id']}/run.json"))
    told = {entry["path"]: entry["detail"] for entry in record["checkpoints"] if "detail" in entry}
    assert told == {"bert/config.json": "changed: its element type is float16 now"}
    assert mirror.sync(dtype="float16") == {"up_to_date": 5}
    mirror.forget()
    assert mirror.sync(dtype="float16") == {"up_to_date": 5}
    assert mirror.sync(dtype="float16", checksum=True) == {"up_to_date": 5}
    assert mirror.sync() == {"converted": 2, "copied": 1, "up_to_date": 2}
    assert mirror.read("bert/config.json") == b'{"layers": 2, "torch_dtype": "float32"}'


def test_include_adds_files_and_exclude_takes_away(mirror: Mirror) -> None:
    assert mirror.sync(include=["**/*.png"], exclude=["bert/**"]) == {"converted": 1, "copied": 2}
    assert mirror.files() == {
        "gpt/last.bin", "gpt/last.bin.manifest.json", "gpt/README.md", "gpt/figures/loss.png",
    }  # fmt: skip


@ON_BOTH
def test_what_changed_goes_again(mirror: Mirror) -> None:
    mirror.sync()
    time.sleep(0.01)
    mirror.put("bert/config.json", b'{"layers": 3}')  # of the same size
    mirror.put("gpt/last.ckpt", mirror.blank[:])
    counts = mirror.sync()
    assert counts["copied"] == 1
    assert mirror.read("bert/config.json") == b'{"layers": 3}'


def test_checksum_passes_over_what_was_only_touched(mirror: Mirror) -> None:
    mirror.sync()
    for path in Path(mirror.root, "source").rglob("*.*"):
        os.utime(path, (1, 1))
    assert mirror.sync(checksum=True) == {"up_to_date": 5}
    assert mirror.sync() == {"up_to_date": 5}  # the new times are known from now on


def test_checksum_finds_what_changed_behind_its_time_and_size(mirror: Mirror) -> None:
    mirror.sync()
    for name, old, new in (("gpt/README.md", b"gpt", b"GPT"), ("bert/step1.pt", b"\0\0\x80?", b"\0\0\0@")):
        path = Path(mirror.root, "source", name)
        status = path.stat()
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new, 1))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert mirror.sync() == {"up_to_date": 5}
    counts = mirror.sync(checksum=True)
    # The damage of the weights is seen by the archive's own CRC-32: they are refused, the old ones stay.
    assert counts == {"copied": 1, "up_to_date": 3, "rejected": 1}
    assert mirror.reasons() == ["checksum_mismatch"]
    assert mirror.read("gpt/README.md") == b"# GPT"


def test_without_delete_nothing_is_deleted(mirror: Mirror) -> None:
    mirror.sync()
    mirror.drop("bert/step1.pt")
    assert mirror.sync() == {"up_to_date": 4}
    assert mirror.files() == OUTPUTS | COMPANIONS


@ON_BOTH
def test_delete_takes_away_what_is_gone_and_nothing_that_ptbin_did_not_put_there(mirror: Mirror) -> None:
    mirror.sync()
    mirror.put("bert/mine.bin", b"somebody's", "dest")
    mirror.put("bert/notes.json", b"{}", "dest")
    for path in ("bert/step1.pt", "bert/config.json"):
        mirror.drop(path)
    assert mirror.sync(delete=True) == {"up_to_date": 3, "deleted": 3}
    left = {"bert/mine.bin", "bert/notes.json", "bert/tokenizer.model", "gpt/README.md"}
    assert mirror.files() == left | {"gpt/last.bin", "gpt/last.bin.manifest.json"}
    assert mirror.sync(delete=True) == {"up_to_date": 3}


@ON_BOTH
def test_delete_knows_its_outputs_without_the_index(mirror: Mirror) -> None:
    mirror.sync()
    mirror.forget()
    mirror.drop("bert/step1.pt")
    assert mirror.sync(delete=True)["deleted"] == 2
    assert not {"bert/step1.bin", "bert/step1.bin.manifest.json"} & mirror.files()


def test_nothing_is_deleted_when_anything_failed(mirror: Mirror) -> None:
    mirror.sync()
    mirror.drop("bert/step1.pt")
    mirror.put("gpt/broken.pt", mirror.blank[:-50])
    assert mirror.sync(delete=True) == {"up_to_date": 4, "rejected": 1, "kept": 1}
    assert mirror.files() >= OUTPUTS


def test_more_than_max_delete_deletes_none(mirror: Mirror) -> None:
    mirror.sync()
    mirror.drop("bert/step1.pt")
    mirror.drop("bert/config.json")
    assert mirror.sync(delete=True, max_delete=1) == {"up_to_date": 3, "kept": 2}
    assert mirror.reasons() == ["max_delete"]
    assert mirror.files() == OUTPUTS | COMPANIONS
    assert mirror.sync(delete=True, max_delete=2)["deleted"] == 3


def test_excluded_files_are_not_deleted(mirror: Mirror) -> None:
    mirror.sync()
    assert mirror.sync(delete=True, exclude=["bert/**"]) == {"up_to_date": 2}
    assert mirror.files() == OUTPUTS | COMPANIONS


def test_a_manifest_that_names_files_elsewhere_deletes_none_of_them(mirror: Mirror) -> None:
    mirror.sync()
    mirror.put("precious.bin", b"not yours", "dest")
    manifest = json.loads(mirror.read("gpt/last.bin.manifest.json"))
    manifest["outputs"][0]["path"] = "../precious.bin"
    mirror.put("old/x.bin.manifest.json", json.dumps(manifest).encode(), "dest")
    mirror.sync(delete=True)
    assert "precious.bin" in mirror.files()
    # Nor files beside it that are called otherwise than it is.
    mirror.put("gpt/mine.bin", b"not yours", "dest")
    manifest["outputs"][0] |= {"path": "mine.bin", "size": 9}
    mirror.put("gpt/last.bin.manifest.json", json.dumps(manifest).encode(), "dest")
    mirror.drop("gpt/last.ckpt")
    assert mirror.sync(delete=True)["kept"] == 1
    assert {"gpt/mine.bin", "gpt/last.bin.manifest.json"} <= mirror.files()


@ON_BOTH
def test_a_source_inside_dest_is_refused(mirror: Mirror) -> None:
    mirror.put("in/a.pt", mirror.blank, "dest")
    before = mirror.files()
    with pytest.raises(UsageError, match="inside the destination"):
        mirror.sync(source="dest/in", delete=True)
    assert mirror.files() == before


def test_outputs_of_another_conversion_into_dest_stay(mirror: Mirror) -> None:
    mirror.sync()
    mirror.put("other/x.pt", mirror.blank, "elsewhere")
    mirror.put("other/config.json", b"{}", "elsewhere")
    mirror.sync(source="elsewhere")
    theirs = {"other/x.bin", "other/x.bin.manifest.json", "other/config.json"}
    assert mirror.sync(delete=True) == {"up_to_date": 5}
    mirror.forget()
    assert mirror.sync(delete=True) == {"up_to_date": 5}
    assert mirror.files() == OUTPUTS | COMPANIONS | theirs


def test_a_copy_made_by_hand_stays(mirror: Mirror) -> None:
    mirror.sync()
    for name in ("last.bin", "last.bin.manifest.json"):
        mirror.put(f"keep/{name}", mirror.read(f"gpt/{name}"), "dest")
    mirror.drop("gpt/last.ckpt")
    assert mirror.sync(delete=True)["deleted"] == 2
    assert {"keep/last.bin", "keep/last.bin.manifest.json"} <= mirror.files()


def test_nothing_is_deleted_through_a_symbolic_link(mirror: Mirror, tmp_path: Path) -> None:
    mirror.sync()
    shutil.move(tmp_path / "dest" / "gpt", tmp_path / "disk")
    (tmp_path / "dest" / "gpt").symlink_to(tmp_path / "disk")
    mirror.drop("gpt/last.ckpt")
    mirror.drop("gpt/README.md")
    assert mirror.sync(delete=True) == {"up_to_date": 3, "kept": 2}
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {
        "last.bin", "last.bin.manifest.json", "README.md",
    }  # fmt: skip


@ON_BOTH
def test_a_source_by_another_spelling_is_the_same_source(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not mirror.options:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "alias").symlink_to("source")
    mirror.sync(source="source/")
    for path in ("gpt/last.ckpt", "gpt/README.md"):
        mirror.drop(path)
    if mirror.options:
        assert mirror.sync(delete=True)["deleted"] == 3
        return
    monkeypatch.setattr(mirror, "root", ".")
    assert mirror.sync(source="alias", delete=True)["deleted"] == 3


def test_exclude_protects_by_the_name_at_the_source_or_of_the_output(mirror: Mirror) -> None:
    mirror.sync()
    for path in ("gpt/last.ckpt", "bert/step1.pt", "gpt/README.md"):
        mirror.drop(path)
    assert mirror.sync(delete=True, exclude=["*.ckpt", "step1.bin"]) == {"up_to_date": 2, "deleted": 1}
    assert mirror.files() == OUTPUTS | {"bert/config.json", "bert/tokenizer.model"}
    # Manifests are no names of anybody's files.
    assert mirror.sync(delete=True, exclude=["*.json"])["deleted"] == 4


@pytest.mark.parametrize("source", ["source/gpt/last.ckpt", "source/**/*.ckpt"])
def test_delete_needs_a_whole_folder_as_source(mirror: Mirror, source: str) -> None:
    mirror.sync()
    with pytest.raises(UsageError, match="--delete needs a directory or prefix"):
        mirror.sync(source=source, delete=True)
    assert mirror.files() == OUTPUTS | COMPANIONS


@pytest.mark.parametrize("target", ["nowhere", "gpt"])
def test_a_link_that_leads_nowhere_is_counted_and_nothing_is_deleted(
    mirror: Mirror, tmp_path: Path, target: str
) -> None:
    mirror.sync()
    shutil.rmtree(tmp_path / "source" / "gpt")
    (tmp_path / "source" / "gpt").symlink_to(target)
    assert mirror.sync(delete=True) == {"up_to_date": 3}
    assert mirror.summary["skipped"] == {"dangling_link": 1}
    assert mirror.files() == OUTPUTS | COMPANIONS
    # What is excluded need not be there.
    assert mirror.sync(delete=True, exclude=["gpt/**"]) == {"up_to_date": 3}


# S3's listings and manifests have no common mark of the content but the size.
@pytest.mark.parametrize(
    ("mirror", "size"), [("files", "another"), ("s3", "another"), ("files", "the same")], indirect=["mirror"]
)
def test_somebody_elses_file_under_the_name_of_an_output_stays(
    mirror: Mirror, size: str, tmp_path: Path
) -> None:
    mirror.sync()
    old = mirror.read("gpt/last.bin")
    mirror.drop("gpt/last.ckpt")
    if size == "another":
        mirror.put("gpt/last.bin", b"fine-tuned for weeks", "dest")
    else:
        time.sleep(0.02)
        mirror.put("gpt/last.bin", bytes(len(old)), "dest")
    assert mirror.sync(delete=True) == {"up_to_date": 4, "kept": 1}
    assert mirror.files() == OUTPUTS | COMPANIONS


def test_an_output_that_was_only_touched_is_still_deleted(mirror: Mirror, tmp_path: Path) -> None:
    mirror.sync()
    os.utime(tmp_path / "dest" / "gpt" / "last.bin")
    mirror.drop("gpt/last.ckpt")
    assert mirror.sync(delete=True)["deleted"] == 2


def test_the_statement_of_an_output_goes_with_it(mirror: Mirror) -> None:
    mirror.sync(provenance=True)
    assert "gpt/last.bin.intoto.json" in mirror.files()
    mirror.drop("gpt/last.ckpt")
    assert mirror.sync(provenance=True, delete=True)["deleted"] == 3
    assert not any(path.startswith("gpt/last") for path in mirror.files())


def test_what_was_deleted_is_named_in_the_run_record(mirror: Mirror) -> None:
    mirror.sync()
    mirror.drop("gpt/last.ckpt")
    mirror.sync(delete=True)
    record = json.loads(mirror.read(f"_ptbin/runs/{mirror.summary['run_id']}/run.json"))
    assert sorted(record["deleted_paths"]) == ["gpt/last.bin", "gpt/last.bin.manifest.json"]


def test_immutable_outputs_stay_and_are_told(mirror: Mirror) -> None:
    mirror.sync()
    time.sleep(0.01)
    mirror.put("bert/config.json", b'{"layers": 9}')
    mirror.put("bert/step2.pt", mirror.blank)
    assert mirror.sync(immutable=True) == {"converted": 1, "up_to_date": 4, "failed": 1}
    assert mirror.reasons() == ["immutable"]
    assert mirror.read("bert/config.json") == b'{"layers": 2}'


def test_immutable_takes_an_output_with_a_weaker_proof_for_unchanged(mirror: Mirror) -> None:
    mirror.sync(verify="none")
    assert mirror.sync(verify="checksum", immutable=True) == {"up_to_date": 5}


@ON_BOTH
def test_what_is_written_over_or_deleted_is_kept_in_the_backup_place(mirror: Mirror) -> None:
    mirror.sync()
    time.sleep(0.01)
    old = mirror.read("gpt/last.bin")
    mirror.drop("gpt/last.ckpt")
    mirror.put("bert/config.json", b'{"layers": 4}')
    counts = mirror.sync(delete=True, backup_dir=f"{mirror.root}/backup")
    assert counts == {"copied": 1, "up_to_date": 3, "deleted": 2, "backed_up": 3}
    assert mirror.files("backup") == {"bert/config.json", "gpt/last.bin", "gpt/last.bin.manifest.json"}
    assert mirror.read("bert/config.json", "backup") == b'{"layers": 2}'
    assert mirror.read("gpt/last.bin", "backup") == old


@pytest.mark.parametrize("place", ["source/old", "dest/old"])
def test_a_backup_place_inside_the_mirror_is_refused(mirror: Mirror, place: str) -> None:
    with pytest.raises(UsageError, match="lie in one another"):
        mirror.sync(backup_dir=f"{mirror.root}/{place}")


@pytest.mark.parametrize("place", ["../source/old", "alias/old", "source/../dest", "."])
def test_a_backup_place_is_refused_by_whatever_name(
    mirror: Mirror, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "alias").symlink_to("source")
    monkeypatch.chdir(tmp_path / "work" if place.startswith("../") else tmp_path)
    for spelled in (place, f"file://{os.path.abspath(place)}"):
        with pytest.raises(UsageError, match="lie in one another"):
            mirror.sync(backup_dir=spelled)


@ON_BOTH
def test_shards_are_saved_before_they_are_written_over_even_without_the_index(mirror: Mirror) -> None:
    mirror.sync(max_shard_size=1)
    shards = {path for path in mirror.files() if "-of-" in path}
    assert shards
    mirror.forget()
    mirror.sync(checksum=True, dtype="float16", max_shard_size=1, backup_dir=f"{mirror.root}/backup")
    assert shards <= mirror.files("backup")


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


@pytest.mark.parametrize("mirror", ["s3"], indirect=True)
def test_large_files_are_copied_by_the_store_itself(mirror: Mirror) -> None:
    mirror.put("gpt/vocabulary.json", b"x" * (12 << 20))
    mirror.sync()
    assert mirror.read("gpt/vocabulary.json") == b"x" * (12 << 20)
    assert mirror.summary["copied_bytes"] >= 8 << 20


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
