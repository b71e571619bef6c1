"""What is converted again and what is not: manifests vouch for outputs, and for nothing else."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin import catalog
from ptbin.catalog import Job, plan_outputs
from ptbin.errors import StorageError
from ptbin.options import ConvertOptions
from ptbin.stores.local import LocalStore
from tests.fakes import CountingStore, registered

# --------------------------------------------------------------------------------------- is_up_to_date


def _touch(folder: Path, *paths: str) -> None:
    for path in paths:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"x")


@pytest.fixture
def done(tmp_path: Path) -> Job:
    """A converted checkpoint, as the next run meets it."""
    source = tmp_path / "source" / "model.pt"
    source.parent.mkdir()
    torch.save({"w": torch.arange(10.0)}, source)
    job = _job(source, tmp_path / "out")
    ptbin.convert(job.source_uri, job.dest_uri)
    return job


def _job(source: Path, dest: Path) -> Job:
    ((job,), _) = plan_outputs(catalog.find_checkpoints(str(source.parent)), str(dest))
    return job


def _again(job: Job) -> Job:
    """The job as a new listing would make it."""
    return _job(Path(job.source_uri), Path(job.dest_uri).parent)


def _manifest(job: Job) -> Path:
    return Path(f"{job.dest_uri}.manifest.json")


def _edit_manifest(job: Job, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(_manifest(job).read_bytes())
    edit(manifest)
    _manifest(job).write_text(json.dumps(manifest))


DEFAULT = ConvertOptions()


def test_a_finished_conversion_is_up_to_date(done: Job) -> None:
    assert catalog.is_up_to_date(_again(done), DEFAULT)


def test_asking_costs_one_small_read_and_one_stat(done: Job) -> None:
    with registered("counted", CountingStore(LocalStore())) as store:
        job = dataclasses.replace(done, dest_uri=f"counted://{done.dest_uri}")
        assert catalog.is_up_to_date(job, DEFAULT)
    assert (store.count("read"), store.count("stat"), len(store.calls)) == (1, 1, 3)


def test_a_touched_source_is_converted_again(done: Job) -> None:
    os.utime(done.source_uri, ns=(0, 1))
    assert not catalog.is_up_to_date(_again(done), DEFAULT)


def test_a_source_overwritten_by_one_of_equal_size_is_converted_again(done: Job) -> None:
    size = Path(done.source_uri).stat().st_size
    torch.save({"w": torch.arange(10.0) + 1}, done.source_uri)
    assert Path(done.source_uri).stat().st_size == size
    assert not catalog.is_up_to_date(_again(done), DEFAULT)
    # a store whose identity says nothing of the size
    assert not catalog.is_up_to_date(dataclasses.replace(done, source_size=size + 1), DEFAULT)


def test_the_same_file_at_another_place_is_another_source(done: Job, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    Path(done.source_uri).parent.rename(moved)
    assert not catalog.is_up_to_date(_job(moved / "model.pt", tmp_path / "out"), DEFAULT)


@pytest.mark.parametrize(
    "changes",
    [
        {"select": "."},
        {"strip_prefix": "auto"},
        {"rename": (("w", "v"),)},
        {"drop": ("nothing",)},
        {"on_unsafe": "extract"},
        {"force": True},
        {"verify": "load"},
    ],
    ids=str,
)
def test_other_wishes_are_converted_again(done: Job, changes: dict[str, Any]) -> None:
    assert not catalog.is_up_to_date(done, ConvertOptions(**changes))


def test_a_higher_proof_is_enough_for_a_lower_one(done: Job) -> None:
    assert catalog.is_up_to_date(done, ConvertOptions(verify="none"))
    for level, enough in {"none": False, "checksum": True, "load": True, "nonsense": False}.items():
        verification = {"level": level, "status": "verified"}
        _edit_manifest(done, functools.partial(dict.update, verification=verification))
        assert catalog.is_up_to_date(done, DEFAULT) == enough


def test_an_output_that_is_missing_short_or_long_is_converted_again(done: Job) -> None:
    output = Path(done.dest_uri)
    whole = output.read_bytes()
    for wrong in (whole[:-1], whole + b"x", b""):
        output.write_bytes(wrong)
        assert not catalog.is_up_to_date(done, DEFAULT)
    output.unlink()
    assert not catalog.is_up_to_date(done, DEFAULT)
    output.write_bytes(whole)
    assert catalog.is_up_to_date(done, DEFAULT)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"schema_version": 2}'])
def test_a_manifest_that_is_none_does_not_count(done: Job, text: bytes) -> None:
    _manifest(done).write_bytes(text)
    assert not catalog.is_up_to_date(done, DEFAULT)
    _manifest(done).unlink()
    assert not catalog.is_up_to_date(done, DEFAULT)


def test_a_manifest_cut_short_anywhere_does_not_count(done: Job) -> None:
    whole = _manifest(done).read_bytes().rstrip()
    for nbytes in range(len(whole)):
        _manifest(done).write_bytes(whole[:nbytes])
        assert not catalog.is_up_to_date(done, DEFAULT)


@pytest.mark.parametrize("path", ["../out/model.bin", "/etc/passwd", "..", "", "a\\b"])
def test_a_manifest_that_points_out_of_its_folder_does_not_count(done: Job, path: str) -> None:
    _edit_manifest(done, lambda manifest: manifest["outputs"][0].update(path=path))
    assert not catalog.is_up_to_date(done, DEFAULT)
    assert [issue.reason for issue in ptbin.verify(str(_manifest(done)))] == ["bad_manifest"]


def test_a_manifest_without_outputs_vouches_for_nothing(done: Job) -> None:
    _edit_manifest(done, lambda manifest: manifest.update(outputs=[]))
    Path(done.dest_uri).unlink()
    assert not catalog.is_up_to_date(done, DEFAULT)


def test_a_manifest_nested_without_end_does_not_count(done: Job) -> None:
    _manifest(done).write_bytes(b"[" * 100_000)
    assert not catalog.is_up_to_date(done, DEFAULT)


def test_without_an_identity_nothing_is_known(done: Job) -> None:
    assert not catalog.is_up_to_date(dataclasses.replace(done, identity=None), DEFAULT)


# ------------------------------------------------------------------------ find_manifests, find_orphans


def test_manifests_and_orphans(done: Job) -> None:
    out = Path(done.dest_uri).parent
    _touch(out, "run/orphan.bin", "run/readme.md", "_ptbin/runs/1/x.bin", "_ptbin/runs/1/y.bin.manifest.json")
    _touch(out, "lost.bin.manifest.json")  # a manifest whose output is gone is verify's to find
    assert sorted(catalog.find_manifests(str(out))) == [f"{out}/lost.bin.manifest.json", str(_manifest(done))]
    assert list(catalog.find_orphans(str(out))) == [f"{out}/run/orphan.bin"]


def test_manifests_of_one_output(done: Job, tmp_path: Path) -> None:
    for uri in (done.dest_uri, str(_manifest(done))):
        assert list(catalog.find_manifests(uri)) == [str(_manifest(done))]
    with pytest.raises(StorageError):
        list(catalog.find_manifests(str(tmp_path / "missing.bin")))


def test_an_output_whose_manifest_lies_in_another_folder_is_an_orphan(done: Job) -> None:
    _touch(Path(done.dest_uri).parent, "run/model.bin")
    orphans = list(catalog.find_orphans(str(Path(done.dest_uri).parent)))
    assert orphans == [str(Path(done.dest_uri).parent / "run" / "model.bin")]
