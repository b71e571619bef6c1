from __future__ import annotations

import os
import zipfile
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ptbin.errors import AccessDeniedError, NotFoundInStoreError, SourceChangedError, StorageError, UsageError
from ptbin.stores import open_store
from ptbin.stores.fsspec_store import FsspecStore, identity_from, open_fsspec
from ptbin.stores.requests import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.endpoint import S3Endpoint

QUICK = RetryPolicy(attempts=3, first_delay_s=0.0)


class OddFileSystem(MemoryFileSystem):
    """A memory filesystem that fails, and gives short answers, as told in `script`."""

    protocol = "odd"
    store: dict[str, Any] = {}  # noqa: RUF012 - as its base
    pseudo_dirs = [""]  # noqa: RUF012
    script: list[Exception | int] = []  # noqa: RUF012
    calls = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        type(self).calls += 1
        data: bytes = super().cat_file(path, start=start, end=end)
        if self.script:
            answer = self.script.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return data[:answer]
        return data


@pytest.fixture
def odd() -> Iterator[FsspecStore]:
    fsspec.register_implementation("odd", OddFileSystem, clobber=True)
    OddFileSystem.store.clear()
    OddFileSystem.script.clear()
    OddFileSystem.calls = 0
    store = FsspecStore("odd://a/x", "/a/x", {}, retry=QUICK)
    store.write_bytes("/a/x", b"0123456789")
    yield store
    OddFileSystem.script.clear()


def test_passing_faults_are_outlasted(odd: FsspecStore) -> None:
    OddFileSystem.script += [ConnectionResetError("reset"), 4]
    with odd.open_reader("/a/x") as reader:
        assert reader.read(0, 10) == b"0123456789"
        assert reader.requests == OddFileSystem.calls == 3


def test_attempts_are_bounded(odd: FsspecStore) -> None:
    OddFileSystem.script += [4, 4, 4, 4]
    with odd.open_reader("/a/x") as reader, pytest.raises(StorageError, match="4 of 10 bytes"):
        reader.read(0, 10)
    assert OddFileSystem.calls == 3


def test_permanent_faults_are_told_at_once(odd: FsspecStore) -> None:
    OddFileSystem.script += [PermissionError("no")]
    with odd.open_reader("/a/x") as reader, pytest.raises(AccessDeniedError, match="odd://a/x"):
        reader.read(0, 10)
    assert OddFileSystem.calls == 1


def test_a_short_answer_of_another_object_says_so(odd: FsspecStore) -> None:
    with odd.open_reader("/a/x") as reader:
        odd.write_bytes("/a/x", b"01")
        with pytest.raises(SourceChangedError):
            reader.read(0, 10)


def test_a_server_that_ignores_ranges_is_found_out(odd: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OddFileSystem, "cat_file", lambda self, path, start, end: b"0123456789")
    with odd.open_reader("/a/x") as reader, pytest.raises(StorageError, match="ignores ranges"):
        reader.read(0, 3)


def test_a_failed_move_leaves_nothing(odd: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: OddFileSystem, *_: Any, **__: Any) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(OddFileSystem, "cp_file", fails)
    with pytest.raises(StorageError, match="free some space"):
        odd.write_bytes("/a/new", b"x")
    assert list(OddFileSystem.store) == ["/a/x"]


def test_a_size_that_does_not_match_is_not_published(
    odd: FsspecStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with odd.open_writer("/a/new") as writer:
        writer.write(b"012")
        monkeypatch.setattr(OddFileSystem, "info", lambda self, path: {"size": 2, "type": "file"})
        with pytest.raises(StorageError, match="3 bytes were written, 2 are stored"):
            writer.commit()
    monkeypatch.undo()
    assert list(OddFileSystem.store) == ["/a/x"]


def test_what_others_write_is_seen(moto_s3: S3Endpoint) -> None:
    bucket = moto_s3.make_bucket()
    theirs = moto_s3.store()
    ours, root = open_fsspec(f"s3://{bucket}/p", moto_s3.storage_options)
    theirs.write_bytes(f"{bucket}/p/x", b"1")
    assert [found.path for found in ours.iter_objects(root)] == ["x"]
    theirs.write_bytes(f"{bucket}/p/x", b"22")
    theirs.write_bytes(f"{bucket}/p/y", b"333")
    assert [found.size for found in ours.iter_objects(root)] == [2, 3]
    theirs.write_bytes(f"{bucket}/p/x", b"4444")
    assert ours.stat(f"{root}/x").size == 4


MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("info", "kind", "value"),
    [
        ({"ETag": '"abc"', "LastModified": MOMENT}, "etag", "abc"),
        ({"etag": 'W/"abc"'}, "etag", "abc"),
        ({"generation": 17}, "version_id", "17"),
        ({"md5": "00ff", "mtime": 1.5}, "checksum", "00ff"),
        ({"uid": 0, "mtime": MOMENT}, "mtime", f"{MOMENT.timestamp():.6f}-9"),
        ({"uid": "abc"}, "uid", "abc"),
        ({"created": MOMENT.timestamp()}, "mtime", f"{MOMENT.timestamp():.6f}-9"),
        ({"mtime": MOMENT.replace(tzinfo=None)}, "mtime", f"{MOMENT.timestamp():.6f}-9"),
        ({"modified": "Mon, 1 Jan"}, "mtime", "Mon, 1 Jan-9"),
        ({"etag": None, "name": "x"}, "uid", "size-9"),
    ],
)
def test_the_strongest_identity_is_taken(info: dict[str, Any], kind: str, value: str) -> None:
    identity = identity_from(info, 9)
    assert (identity.kind, identity.value) == (kind, value)


@pytest.mark.parametrize(
    ("uri", "path", "public"),
    [
        ("memory://a/b", "/a/b", "memory://a/b"),
        ("memory://a/b/", "/a/b", "memory://a/b"),
        ("gcs://bucket/a/b", "bucket/a/b", "gcs://bucket/a/b"),
        ("sftp://ann:s3cret@host/a/b", "/a/b", "sftp://ann@host/a/b"),
    ],
)
def test_uris_and_paths_turn_into_each_other(uri: str, path: str, public: str) -> None:
    if uri.startswith("gcs"):
        pytest.importorskip("gcsfs")
    if uri.startswith("sftp"):
        pytest.importorskip("paramiko")
    store, found = open_store(uri)
    assert found == path
    assert store.uri_of(found) == public
    assert store.uri_of(path + "/more") == public + "/more"


@pytest.mark.parametrize("chain", ["zip://runs::{}", "zip://runs/::file://{}", "simplecache::zip://runs::{}"])
def test_what_lies_in_an_archive_is_listed_and_opened_by_its_chained_url(tmp_path: Path, chain: str) -> None:
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as writing:
        writing.writestr("runs/a.pt", b"0123")
        writing.writestr("runs/deep/b.pt", b"01234")
    store, path = open_store(chain.format(archive))
    found = list(store.iter_objects(path))
    assert [item.path for item in found] == ["a.pt", "deep/b.pt"]
    for item in found:
        assert item.identity is not None
        assert item.identity.kind == "checksum"
        again, its_path = open_store(item.uri)
        assert again.read_bytes(its_path) == b"01234"[: item.size]
    with pytest.raises(StorageError, match="cannot write to"):
        store.check_writable(path)


def test_an_unknown_protocol_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nothing-known"):
        open_store("nothing-known://x/y")
    with pytest.raises(UsageError, match="empty"):
        open_store("")


def test_a_read_only_protocol_says_so() -> None:
    store, path = open_store("http://127.0.0.1:9/x")
    with pytest.raises(StorageError):
        store.open_writer(path)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_web_server_that_refuses_is_not_said_to_lack_the_file(scheme: str) -> None:
    """fsspec raises FileNotFoundError, whatever went wrong."""
    uri = f"{scheme}://127.0.0.1:9/x"
    with pytest.raises(StorageError, match="the store does not answer") as caught:
        FsspecStore(uri, uri, {}, retry=QUICK).stat(uri)
    assert caught.value.transient
    assert not isinstance(caught.value, NotFoundInStoreError)


def test_a_store_connects_anew_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = open_store("memory://fork/x")
    assert isinstance(store, FsspecStore)
    before = store.fs
    assert store.fs is before
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert store.fs is not before
