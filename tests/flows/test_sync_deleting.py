"""What a mirror deletes, writes over and keeps: nothing that ptbin did not put there."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from ptbin.errors import UsageError
from tests.mirrors import COMPANIONS, ON_BOTH, OUTPUTS, Mirror, mirror
from tests.servers.fixtures import moto_s3

__all__ = ["mirror", "moto_s3"]

pytestmark = pytest.mark.usefixtures("server")


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
