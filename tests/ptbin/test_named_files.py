"""A few named files are asked for one by one; whatever else a name may mean takes a listing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptbin.catalog import asked
from ptbin.catalog.finding import find_checkpoints
from ptbin.catalog.named import NamedFiles
from ptbin.stores.local import LocalStore


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places that were listed."""
    seen: list[str] = []
    really = LocalStore.iter_objects

    def note(self: LocalStore, path: str, *more: object) -> object:
        seen.append(path)
        return really(self, path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStore, "iter_objects", note)
    return seen


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for path in (
        "a.pt",
        "run/b.ckpt",
        "run/c.ckpt",
        "run/ckpt/.metadata",
        "run/ckpt/__0_0.distcp",
        "notes.txt",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    return tmp_path


def test_plain_files_cost_no_listing_and_are_what_a_listing_says(
    place: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("run/c.ckpt", "./a.pt", "gone.pt")
    quick = list(find_checkpoints(str(place), named=NamedFiles(names)))
    assert listings == []
    monkeypatch.setattr(asked, "MAX_ASKED", 1)
    assert list(find_checkpoints(str(place), named=NamedFiles(names))) == quick
    assert listings == [str(place)]
    assert [one.path for one in quick] == ["a.pt", "run/c.ckpt"]


def test_what_is_not_there_is_missing_all_the_same(place: Path, listings: list[str]) -> None:
    named = NamedFiles(["a.pt", "gone.pt"])
    assert len(list(find_checkpoints(str(place), named=named))) == 1
    (problem,) = named.missing(str(place))
    assert problem.source.endswith("/gone.pt")
    assert listings == []


@pytest.mark.parametrize(
    "name", ["run/ckpt", "run/ckpt/__0_0.distcp", "run/ckpt/.metadata", "a.pt/../run/b.ckpt"]
)
def test_folders_parts_and_odd_names_take_a_listing(place: Path, listings: list[str], name: str) -> None:
    list(find_checkpoints(str(place), named=NamedFiles([name, "a.pt"])))
    assert listings == [str(place)]


def test_exclude_holds_for_what_is_named(place: Path, listings: list[str]) -> None:
    named = NamedFiles(["a.pt", "run/b.ckpt"])
    assert [one.path for one in find_checkpoints(str(place), exclude=("run/*",), named=named)] == ["a.pt"]
    assert listings == []
