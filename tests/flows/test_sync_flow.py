"""Mirrors: what goes along, what a second run does, what is deleted and what never is; on files and on S3."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.run_record import new_run_id
from flows.sync import sync
from ptbin.errors import UsageError
from ptbin.stores import Store, open_store
from tasks.live import LiveRun, open_live_run
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import moto_s3

__all__ = ["moto_s3"]

pytestmark = pytest.mark.usefixtures("server")


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

    def sync(self, **parameters: Any) -> dict[str, Any]:
        """The summary's counts that are not zero."""
        with open_live_run(LiveRun(new_run_id(), self.options, self.options)) as live:
            state = sync(
                f"{self.root}/source",
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


@pytest.fixture(params=["files", "s3"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path, _blank: bytes) -> Mirror:
    if request.param == "files":
        return Mirror(str(tmp_path), {}, _blank)
    endpoint: S3Endpoint = request.getfixturevalue("moto_s3")
    return Mirror(f"s3://{endpoint.make_bucket()}/m", endpoint.storage_options, _blank)


OUTPUTS = {"bert/step1.bin", "bert/step1.bin.manifest.json", "gpt/last.bin", "gpt/last.bin.manifest.json"}
COMPANIONS = {"bert/config.json", "bert/tokenizer.model", "gpt/README.md"}


def test_a_mirror_has_weights_and_companions_and_the_second_run_does_nothing(mirror: Mirror) -> None:
    assert mirror.sync() == {"converted": 2, "copied": 3}
    assert mirror.files() == OUTPUTS | COMPANIONS
    assert mirror.read("bert/config.json") == b'{"layers": 2}'
    assert mirror.sync() == {"up_to_date": 5}
    assert mirror.summary["written_bytes"] == 0


def test_include_adds_files_and_exclude_takes_away(mirror: Mirror) -> None:
    assert mirror.sync(include=["**/*.png"], exclude=["bert/**"]) == {"converted": 1, "copied": 2}
    assert mirror.files() == {
        "gpt/last.bin", "gpt/last.bin.manifest.json", "gpt/README.md", "gpt/figures/loss.png",
    }  # fmt: skip


def test_what_changed_goes_again(mirror: Mirror) -> None:
    mirror.sync()
    time.sleep(0.01)
    mirror.put("bert/config.json", b'{"layers": 3}')  # of the same size
    mirror.put("gpt/last.ckpt", mirror.blank[:])
    counts = mirror.sync()
    assert counts["copied"] == 1
    assert mirror.read("bert/config.json") == b'{"layers": 3}'


def test_checksum_passes_over_what_was_only_touched(mirror: Mirror) -> None:
    if mirror.options:
        pytest.skip("an ETag of S3 is one of the content")
    mirror.sync()
    for path in Path(mirror.root, "source").rglob("*.*"):
        os.utime(path, (1, 1))
    assert mirror.sync(checksum=True) == {"up_to_date": 5}
    assert mirror.sync() == {"up_to_date": 5}  # the new times are known from now on


def test_checksum_finds_what_changed_behind_its_time_and_size(mirror: Mirror) -> None:
    if mirror.options:
        pytest.skip("nobody sets the times of S3")
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


def test_delete_knows_its_outputs_without_the_index(mirror: Mirror) -> None:
    mirror.sync()
    store, folder = mirror.place("dest")
    for item in list(store.iter_objects(f"{folder}/_ptbin/index")):
        store.delete(f"{folder}/_ptbin/index/{item.path}")
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


def test_immutable_outputs_stay_and_are_told(mirror: Mirror) -> None:
    mirror.sync()
    time.sleep(0.01)
    mirror.put("bert/config.json", b'{"layers": 9}')
    mirror.put("bert/step2.pt", mirror.blank)
    assert mirror.sync(immutable=True) == {"converted": 1, "up_to_date": 4, "failed": 1}
    assert mirror.reasons() == ["immutable"]
    assert mirror.read("bert/config.json") == b'{"layers": 2}'


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


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    mirror: Mirror, ptbin: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    mirror.sync()
    before = mirror.files()
    mirror.put("bert/step2.pt", mirror.blank)
    mirror.drop("gpt/README.md")
    options = json.dumps(mirror.options)
    done = ptbin(
        "sync", f"{mirror.root}/source", f"{mirror.root}/dest", "--dry-run", "--delete", "--json",
        "--source-options", options, "--dest-options", options,
    )  # fmt: skip
    plan = json.loads(done.stdout)
    assert [item["dest"] for item in plan["convert"]] == [f"{mirror.root}/dest/bert/step2.bin"]
    assert plan["copy"] == []
    assert plan["delete"] == ["gpt/README.md"]
    assert plan["up_to_date"] == 4
    assert mirror.files() == before


def test_large_files_are_copied_by_the_store_itself(mirror: Mirror) -> None:
    if not mirror.options:
        pytest.skip("the kernel does it, between files")
    mirror.put("gpt/vocabulary.json", b"x" * (12 << 20))
    mirror.sync()
    assert mirror.read("gpt/vocabulary.json") == b"x" * (12 << 20)
    assert mirror.summary["copied_bytes"] >= 8 << 20
