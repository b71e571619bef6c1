"""Calls that cannot work are refused before anything is read or written."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from ptbin import catalog
from ptbin.catalog.checks import check_request
from ptbin.catalog.request import RunRequest
from ptbin.errors import StorageError, UsageError
from tests.servers.endpoint import S3Endpoint


def _refused(kind: type[Exception], source: str | Path, dest: str | Path | None, **options: Any) -> str:
    with pytest.raises(kind) as refusal:
        catalog.check_call(str(source), None if dest is None else str(dest), **options)
    message = str(refusal.value)
    assert "\n" not in message
    return message


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source" / "run").mkdir(parents=True)
    for path in ("a.pt", "run/b.pt"):
        (tmp_path / "source" / path).write_bytes(b"x")
    return tmp_path / "source"


def test_a_call_that_can_work_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for one in (source, f"{source}/", f"{source}/*.pt", f"{source}/a.pt", f"file://{source}"):
        catalog.check_call(str(one), str(tmp_path / "new" / "deep"))
        catalog.check_call(str(one), None)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    for name in ("missing", "missing.pt", "missing/*.pt"):
        assert "missing" in _refused(UsageError, tmp_path / name, tmp_path / "out")


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    assert "empty" in _refused(UsageError, tmp_path / "empty", tmp_path / "out")


def test_dest_equal_to_source_is_refused(source: Path) -> None:
    for dest in (source, f"{source}/", f"file://{source}", source / "run" / ".."):
        _refused(UsageError, source, dest)
    _refused(UsageError, source / "a.pt", source / "a.pt")


def test_dest_inside_source_is_refused(source: Path) -> None:
    for dest in (source / "out", source / "run", source / "deep" / "er", f"file://{source}/out"):
        assert "inside" in _refused(UsageError, source, dest)
    _refused(UsageError, f"{source}/**/*.pt", source / "out")


def test_dest_beside_or_above_source_is_fine(source: Path, tmp_path: Path) -> None:
    for dest in (f"{source}-out", tmp_path / "sourc", tmp_path / "out"):
        catalog.check_call(str(source), str(dest))
    catalog.check_call(str(source / "a.pt"), str(source / "a.bin"))


def test_dest_inside_source_by_way_of_a_link_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    _refused(UsageError, source, tmp_path / "link" / "out")
    _refused(UsageError, tmp_path / "link", source / "out")


def test_a_mirror_is_apart_from_its_source_whatever_the_names(source: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tmp_path)
    for dest in (tmp_path, f"file://{tmp_path}", tmp_path / "alias", tmp_path / "source" / ".."):
        with pytest.raises(UsageError, match="inside"):
            check_request(RunRequest(str(source), str(dest), kind="sync"))
    apart = RunRequest(str(source), str(tmp_path / "out"), kind="sync")
    check_request(dataclasses.replace(apart, deletes=True, backup_dir=str(tmp_path / "old")))


def test_a_dest_that_cannot_be_written_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _refused(StorageError, source, tmp_path / "file" / "out")
    _refused(StorageError, source, "/proc/ptbin/out")
    catalog.check_call(str(source), "/proc/ptbin/out", writes=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_dest_without_permission_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    _refused(PermissionError, source, tmp_path / "locked" / "out")


@pytest.mark.parametrize("uri", ["", "nosuch://bucket/x", "s3://", "s3:///x"])
def test_a_uri_that_means_nothing_is_refused(source: Path, tmp_path: Path, uri: str) -> None:
    _refused(UsageError, uri, tmp_path / "out")
    _refused(UsageError, source, uri)


def test_s3_refusals(source: Path, moto_s3: S3Endpoint) -> None:
    bucket, options = moto_s3.make_bucket(), moto_s3.storage_options
    moto_s3.store().write_bytes(f"{bucket}/m/a.pt", b"x")
    both: dict[str, Any] = {"source_options": options, "dest_options": options}
    catalog.check_call(f"s3://{bucket}/m", f"s3://{bucket}/out", **both)
    catalog.check_call(f"s3://{bucket}/m", f"s3://{bucket}/m-out", **both)
    assert "no-such" in _refused(StorageError, source, "s3://no-such-bucket/out", dest_options=options)
    assert "no-such" in _refused(StorageError, "s3://no-such-bucket/m", source, source_options=options)
    _refused(UsageError, f"s3://{bucket}/missing", f"s3://{bucket}/out", **both)
    _refused(UsageError, f"s3://{bucket}/m", f"s3://{bucket}/m/out", **both)
    _refused(UsageError, f"s3://{bucket}", f"s3://{bucket}/out", **both)
    assert [one.path for one in moto_s3.store().iter_objects(bucket)] == ["m/a.pt"]
    assert moto_s3.uploads_in(bucket) == []


def test_no_secret_is_in_a_refusal(source: Path, moto_s3: S3Endpoint) -> None:
    options = {**moto_s3.storage_options, "secret": "hunter2"}
    assert "hunter2" not in _refused(StorageError, source, "s3://no-such-bucket/out", dest_options=options)
