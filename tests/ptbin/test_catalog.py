"""Which files a run takes, where their outputs go, what is done already, and which calls are refused."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ptbin import catalog
from ptbin.catalog import Found
from ptbin.errors import StorageError
from ptbin.stores import ListedObject, Watch, open_store
from ptbin.stores.local import LocalStore
from tests.fakes import CountingStore, HookedStore, registered
from tests.servers.endpoint import S3Endpoint


def _touch(folder: Path, *paths: str) -> None:
    for path in paths:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"x")


def _paths(source: str | Path, **options: Any) -> list[str]:
    return sorted(found.path for found in catalog.find_checkpoints(str(source), **options))


def test_names_decide_what_is_looked_into(tmp_path: Path) -> None:
    certain = ["a.pt", "b.pth", "c.ckpt", "d.bin", "e.th", "f.pth.tar", "UPPER.PT", "deep/er/g.pt", "h.7z"]
    uncertain = ["checkpoint-500", "deep/weights.v2", "noext"]
    others = ["config.json", "notes.md", "log.txt", ".hidden", "events.out.tfevents.123.host", "x.onnx"]
    _touch(tmp_path, *certain, *uncertain, *others)
    found = {one.path: one for one in catalog.find_checkpoints(str(tmp_path))}
    assert {path for path, one in found.items() if one.certain} == set(certain)
    assert {path for path, one in found.items() if not one.certain} == set(uncertain)


def test_what_ptbin_writes_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    _touch(
        tmp_path,
        "run/last.bin",
        "run/last.bin.manifest.json",
        "run/.last.bin.0123.ptbin-partial",
        "_ptbin/runs/1/state.pt",
        "run/_ptbin/x.pt",
    )
    assert _paths(tmp_path) == ["run/last.bin"]
    # not even where everything is asked for
    assert _paths(tmp_path, include=["*"]) == ["run/last.bin"]


def test_found_says_where_how_large_and_which(tmp_path: Path) -> None:
    _touch(tmp_path, "run/a.pt")
    (found,) = catalog.find_checkpoints(str(tmp_path))
    uri = str(tmp_path / "run" / "a.pt")
    store, path = open_store(uri)
    assert found == Found("run/a.pt", uri, 1, store.stat(path).identity, True)


def test_one_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    _touch(tmp_path, "notes.txt")
    (found,) = catalog.find_checkpoints(str(tmp_path / "notes.txt"))
    assert (found.path, found.certain) == ("notes.txt", True)


def test_a_source_that_is_not_there_is_an_error_and_not_an_empty_answer(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        list(catalog.find_checkpoints(str(tmp_path / "missing")))


TREE = ["a.pt", "b.ckpt", "run1/a.pt", "run1/epoch=3.ckpt", "run1/deep/a.pt", "run2/a.pt", "run2/opt.txt"]


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (["*.ckpt"], ["b.ckpt", "run1/epoch=3.ckpt"]),
        (["run1/*"], ["run1/a.pt", "run1/epoch=3.ckpt"]),
        (["run1/**"], ["run1/a.pt", "run1/deep/a.pt", "run1/epoch=3.ckpt"]),
        (["**/a.pt"], ["a.pt", "run1/a.pt", "run1/deep/a.pt", "run2/a.pt"]),
        (["*/a.pt"], ["run1/a.pt", "run2/a.pt"]),
        (["run?/**/a.pt"], ["run1/a.pt", "run1/deep/a.pt", "run2/a.pt"]),
        (["run[!1]/*"], ["run2/a.pt", "run2/opt.txt"]),  # what is asked for by name is looked into
        (["b.ckpt", "run2/a.pt"], ["b.ckpt", "run2/a.pt"]),
        (["A.PT"], []),
        (["nothing/*"], []),
    ],
)
def test_include(tmp_path: Path, include: list[str], expected: list[str]) -> None:
    _touch(tmp_path, *TREE)
    assert _paths(tmp_path, include=include) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (["*.ckpt"], ["a.pt", "run1/a.pt", "run1/deep/a.pt", "run2/a.pt"]),
        (["run1/**"], ["a.pt", "b.ckpt", "run2/a.pt"]),
        (["**/deep/**", "run2/*"], ["a.pt", "b.ckpt", "run1/a.pt", "run1/epoch=3.ckpt"]),
        (["*"], []),
    ],
)
def test_exclude(tmp_path: Path, exclude: list[str], expected: list[str]) -> None:
    _touch(tmp_path, *TREE)
    assert _paths(tmp_path, exclude=exclude) == expected


def test_exclude_wins_over_include(tmp_path: Path) -> None:
    _touch(tmp_path, *TREE)
    assert _paths(tmp_path, include=["**/a.pt"], exclude=["run1/**"]) == ["a.pt", "run2/a.pt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.pt", ["a.pt"]),
        ("run1/*.pt", ["run1/a.pt"]),
        ("run*/a.pt", ["run1/a.pt", "run2/a.pt"]),
        ("**/a.pt", ["a.pt", "run1/a.pt", "run1/deep/a.pt", "run2/a.pt"]),
        ("run[12]/**", ["run1/a.pt", "run1/deep/a.pt", "run1/epoch=3.ckpt", "run2/a.pt"]),
        ("run1/**/*.pt", ["run1/a.pt", "run1/deep/a.pt"]),
        ("run9/*", None),
    ],
)
def test_source_may_be_a_glob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str] | None
) -> None:
    _touch(tmp_path, *TREE)
    for root in (f"{tmp_path}/", f"file://{tmp_path}/", ""):
        monkeypatch.chdir(tmp_path)
        try:
            uris = sorted(found.uri for found in catalog.find_checkpoints(root + pattern))
        except StorageError:
            assert expected is None
        else:
            assert uris == [str(tmp_path / path) for path in expected or ()]


def test_a_path_that_is_there_wins_over_its_reading_as_a_glob(tmp_path: Path) -> None:
    _touch(tmp_path, "run[1].pt", "run1.pt")
    assert _paths(tmp_path / "run[1].pt") == ["run[1].pt"]


def test_a_directory_that_is_there_wins_over_its_reading_as_a_glob(tmp_path: Path) -> None:
    _touch(tmp_path, "run[1]/a.pt", "run1/b.pt")
    assert _paths(tmp_path / "run[1]") == ["a.pt"]


class _Listing(HookedStore):
    """A store that lists what it is told to."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(LocalStore())
        self.paths = paths

    def is_directory(self, path: str) -> bool:
        return True

    def iter_objects(self, path: str, watch: Watch | None = None) -> Iterator[ListedObject]:
        return (ListedObject(one, f"listed://{one}", 1, None) for one in self.paths)


def _glob_oracle(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """A glob folder by folder, `**` for any number of folders, or at the end for all that lies below."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(parts)
        return any(_glob_oracle(parts[count:], pattern[1:]) for count in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _glob_oracle(parts[1:], pattern[1:])


_segments = st.text(alphabet="ab.-^", min_size=1, max_size=3)
_names = _segments.filter(lambda name: not name.startswith("."))  # hidden ones: test_odd_entries.py
_patterns = st.lists(
    st.sampled_from(
        ["**", "*", "?", "a*", "*b", "[ab]*", "[!a]", "a.b", "a", ".*", "[", "a]", "*.", "+", "(b"]
    )
    | _segments,
    min_size=2,
    max_size=4,
)


@given(pattern=_patterns, paths=st.lists(st.lists(_names, min_size=1, max_size=4), max_size=8))
@example(pattern=["[", "[ab]*"], paths=[["a"], ["[", "a"]])
@example(pattern=["**", "a"], paths=[["a"], ["ba"], ["b", "a"], ["b", "ba"]])
@example(pattern=["a", "**", "**", "b"], paths=[["a", "b"], ["a", "a", "b"], ["a"]])
def test_globs_mean_what_they_mean_in_a_shell(pattern: list[str], paths: list[list[str]]) -> None:
    listed = ["/".join(parts) for parts in paths]
    with registered("listed", _Listing(listed)):
        found = [one.path for one in catalog.find_checkpoints("listed://", include=["/".join(pattern)])]
    assert found == ["/".join(parts) for parts in paths if _glob_oracle(parts, pattern)]


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("d/[z-a].pt", [], ["d/z.pt"]),
        ("d/[^a].pt", ["d/^.pt", "d/a.pt"], ["d/b.pt"]),
        ("d/[[]1].pt", ["d/[1].pt"], ["d/1.pt"]),
        ("d/[a&&b].pt", ["d/&.pt"], ["d/c.pt"]),
    ],
)
def test_odd_character_classes(pattern: str, matches: list[str], others: list[str]) -> None:
    with registered("listed", _Listing([*matches, *others])):
        found = [one.path for one in catalog.find_checkpoints("listed://", include=[pattern])]
    assert found == matches


def test_listing_asks_nothing_of_single_files(tmp_path: Path) -> None:
    _touch(tmp_path, *TREE)
    with registered("counted", CountingStore(LocalStore())) as store:
        assert len(_paths(f"counted://{tmp_path}")) == 6
    assert [call.operation for call in store.calls] == ["is_directory", "list"]


def test_s3_prefix_and_glob(moto_s3: S3Endpoint) -> None:
    bucket, store = moto_s3.make_bucket(), moto_s3.store()
    for key in ("m/a.pt", "m/run/b.ckpt", "m/config.json", "mother/c.pt", "m/run/_ptbin/d.pt"):
        store.write_bytes(f"{bucket}/{key}", b"x")
    options = moto_s3.storage_options
    assert _paths(f"s3://{bucket}/m", storage_options=options) == ["a.pt", "run/b.ckpt"]
    assert _paths(f"s3://{bucket}/m/", storage_options=options) == ["a.pt", "run/b.ckpt"]
    assert _paths(f"s3://{bucket}/m/*/*.ckpt", storage_options=options) == ["run/b.ckpt"]
    assert _paths(f"s3://{bucket}", storage_options=options) == ["m/a.pt", "m/run/b.ckpt", "mother/c.pt"]
    (found,) = catalog.find_checkpoints(f"s3://{bucket}/m/a.pt", storage_options=options)
    assert found.identity == store.stat(f"{bucket}/m/a.pt").identity
