"""Places: made of a text once, joined and cut without losing what a store means by a path."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

import ptbin
from ptbin.errors import UsageError
from ptbin.stores import Place, Sides, place_of

SECRET = {"key": "k", "secret": "hush", "endpoint_url": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("start", "path", "uri"),
    [
        ("s3://b", "x.pt", "s3://b/x.pt"),
        ("s3://b/run/", "x.pt", "s3://b/run/x.pt"),
        ("s3://b/run", "/x.pt", "s3://b/run//x.pt"),
        ("s3://b/odd//", "x.pt", "s3://b/odd//x.pt"),
        ("/", "x.pt", "/x.pt"),
        ("/data", "a/x.pt", "/data/a/x.pt"),
        ("memory://m", "x.pt", "memory:///m/x.pt"),
    ],
)
def test_what_is_joined_can_be_cut_again(start: str, path: str, uri: str) -> None:
    options = SECRET if start.startswith("s3") else None
    folder = place_of(start, options)
    place = folder / path
    assert place.uri.replace("memory://m", "memory:///m") == uri
    assert place.relative_to(folder) == path
    assert (place.parent / place.name).path == place.path
    assert place.beside(".manifest.json").without(".manifest.json").path == place.path


def test_a_neighbour_does_not_lie_below() -> None:
    with pytest.raises(ValueError, match="does not lie below"):
        place_of("/data/run10/x.pt").relative_to(place_of("/data/run1"))


def test_a_slash_at_the_end_says_what_lies_below() -> None:
    place = place_of("s3://b/file.pt/", SECRET)
    assert place.path.endswith("/")
    assert place.file.uri == "s3://b/file.pt"
    assert (place.name, place.parent.uri) == ("file.pt", "s3://b")
    assert (place_of("/").parent.path, place_of("/").name) == ("/", "")


def test_no_text_of_a_place_shows_its_options() -> None:
    place = place_of("s3://b/x.pt", SECRET)
    assert "hush" not in repr(place) + str(place) + f"{place}"


def test_two_sides_make_places_here_and_in_another_process_and_show_no_options() -> None:
    sides = pickle.loads(pickle.dumps(Sides(SECRET, {"key": "other"})))
    source, dest = sides.source_at("s3://b/x.pt"), sides.dest_at("s3://b/x.bin")
    assert (source.store.storage_options, dest.store.storage_options) == (SECRET, {"key": "other"})
    assert sides.dest_at(source) is source, "a place has its own options"
    assert "hush" not in repr(sides) + repr(source) + repr([source, {"of": dest}])


def test_a_whole_store_may_be_two_places(tmp_path: Path) -> None:
    memory = place_of("memory://places/whole", {"skip_instance_cache": True})
    torch.save({"weight": torch.ones(30)}, tmp_path / "x.pt")
    (memory / "in" / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes())
    result = ptbin.convert_directory(memory / "in", place_of(tmp_path / "out"))
    assert result.succeeded
    assert ptbin.verify_directory(place_of(tmp_path / "out")).counts["proven"] == 1
    assert ptbin.convert_directory(memory / "in", memory / "out").succeeded
    assert ptbin.verify_directory(memory / "out").counts["proven"] == 1
    with pytest.raises(UsageError, match="storage options already"):
        ptbin.verify_directory(memory / "out", dest_options={"anon": True})


def test_options_beside_a_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="storage options already"):
        place_of(place_of(tmp_path), {"anon": True})


def test_the_verbs_take_paths_and_places(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(30)}, tmp_path / "x.pt")
    manifest = ptbin.convert(tmp_path / "x.pt", Place(place_of(tmp_path).store, str(tmp_path / "x.bin")))
    assert manifest["outputs"][0]["path"] == "x.bin"
    assert ptbin.verify(place_of(tmp_path) / "x.bin.manifest.json") == []
    assert ptbin.inspect(tmp_path / "x.bin")["container"] == "torch_zip"
    assert ptbin.inspect(place_of(tmp_path) / "x.bin")["container"] == "torch_zip"
    assert ptbin.diff(tmp_path / "x.pt", place_of(tmp_path) / "x.bin").equal
    for where in (tmp_path / "x.bin", place_of(tmp_path) / "x.bin"):
        with ptbin.load(where) as weights:
            assert weights["weight"].sum() == 30


def test_options_that_a_side_brings_along_are_not_the_other_sides(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(30)}, tmp_path / "x.pt")
    memory = place_of("memory://places/x.pt")
    memory.write_bytes((tmp_path / "x.pt").read_bytes())
    other = f"simplecache::file://{tmp_path}/x.pt"
    assert ptbin.diff(other, memory, storage_options={"simplecache": {"expiry_time": 9}}).equal


@pytest.mark.parametrize("start", ["s3://b/x", "memory://places/x", "/data/x"])
def test_a_place_can_be_sent_to_another_process(start: str) -> None:
    place = place_of(start, SECRET if start.startswith("s3") else None)
    assert pickle.loads(pickle.dumps(place)).uri == place.uri


def test_weights_at_a_place_are_opened_again_there(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(30)}, tmp_path / "x.pt")
    place = place_of("memory://places/again.pt")
    place.write_bytes((tmp_path / "x.pt").read_bytes())
    with ptbin.load(place) as weights, pickle.loads(pickle.dumps(weights)) as again:
        assert again["weight"].sum() == 30
