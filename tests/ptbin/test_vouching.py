"""What lies at DEST is replaced only where a manifest vouches for it: `output_exists` is the answer else.

The contract is one for local files and S3, and for every way to write an output.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from flows.cli.app import run
from ptbin import ConvertOptions, RestoreOptions
from ptbin.errors import OutputExistsError, PtbinError, UsageError
from ptbin.manifests.claims import ASIDE_SUFFIX
from ptbin.stores import open_store
from tests.servers.endpoint import S3Endpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("warm_children")]

STATE_DICT = {"weight": torch.arange(600.0).reshape(20, 30), "bias": torch.ones(20)}
NETS = "from torch import nn\ndef linear(): return nn.Linear(30, 20)\n"


@dataclass
class Shop:
    """A source of weights, a destination folder in some store, and what lies there."""

    weights: str
    folder: str
    source: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def uri(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def put(self, name: str, data: bytes) -> None:
        store, path = open_store(self.uri(name), self.options)
        store.write_bytes(path, data)

    def read(self, name: str) -> bytes:
        store, path = open_store(self.uri(name), self.options)
        return store.read_bytes(path)

    def names(self) -> set[str]:
        store, path = open_store(self.folder, self.options)
        return {item.path for item in store.iter_objects(path)}

    def model(self, **more: Any) -> RestoreOptions:
        return RestoreOptions(model="vouching_nets:linear", model_path=str(self.source), **more)


@pytest.fixture(params=["local", "s3"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    torch.save(STATE_DICT, tmp_path / "source.pt")
    ptbin.convert(str(tmp_path / "source.pt"), str(tmp_path / "weights" / "last.bin"))
    (tmp_path / "vouching_nets.py").write_text(NETS)
    weights = str(tmp_path / "weights" / "last.bin")
    if request.param == "local":
        yield Shop(weights, str(tmp_path / "dest"), tmp_path)
        return
    moto: S3Endpoint = request.getfixturevalue("moto_s3")
    yield Shop(weights, f"s3://{moto.make_bucket()}/dest", tmp_path, moto.storage_options)


Write = Callable[[Shop, str], object]


def _state_dict(shop: Shop, name: str, *, force: bool = False, source: str = "") -> object:
    options = RestoreOptions(force=force)
    return ptbin.restore(source or shop.weights, shop.uri(name), options, dest_options=shop.options)


def _module(shop: Shop, name: str, *, force: bool = False, source: str = "") -> object:
    options = shop.model(force=force)
    return ptbin.restore(source or shop.weights, shop.uri(name), options, dest_options=shop.options)


def _converted(shop: Shop, name: str, *, force: bool = False, source: str = "") -> object:
    options = ConvertOptions(force=force)
    return ptbin.convert(source or shop.weights, shop.uri(name), options, dest_options=shop.options)


every_way = pytest.mark.parametrize("write", [_state_dict, _module, _converted])


@every_way
def test_a_file_of_somebody_else_stays(shop: Shop, write: Any) -> None:
    shop.put("last.pt", b"a training checkpoint, optimizer included")
    with pytest.raises(OutputExistsError, match="no manifest of ptbin's"):
        write(shop, "last.pt")
    assert shop.read("last.pt") == b"a training checkpoint, optimizer included"
    assert shop.names() == {"last.pt"}


@every_way
def test_force_replaces_it(shop: Shop, write: Any) -> None:
    shop.put("last.pt", b"a training checkpoint, optimizer included")
    write(shop, "last.pt", force=True)
    assert ptbin.verify(shop.uri("last.pt.manifest.json"), storage_options=shop.options) == []


@every_way
def test_an_output_of_its_own_is_replaced(shop: Shop, write: Any, tmp_path: Path) -> None:
    write(shop, "last.pt")
    other = {name: tensor + 1 for name, tensor in STATE_DICT.items()}
    torch.save(other, tmp_path / "other.pt")
    before = shop.read("last.pt")
    write(shop, "last.pt", source=str(tmp_path / "other.pt"))
    assert shop.read("last.pt") != before
    assert ptbin.verify(shop.uri("last.pt.manifest.json"), storage_options=shop.options) == []
    store, path = open_store(shop.uri("last.pt") + ASIDE_SUFFIX, shop.options)
    with pytest.raises(FileNotFoundError):
        store.stat(path)


@pytest.mark.parametrize("write", [_state_dict, _module])
@pytest.mark.parametrize("longer", [True, False], ids=["another size", "same size"])
def test_a_restored_file_that_was_trained_on_stays(shop: Shop, write: Any, longer: bool) -> None:
    """Its manifest is still there, and says what it was."""
    write(shop, "last.pt")
    trained = shop.read("last.pt")[:-1] + (b"trained on" if longer else b"!")
    shop.put("last.pt", trained)
    with pytest.raises(OutputExistsError, match="no longer what ptbin restored"):
        write(shop, "last.pt")
    assert shop.read("last.pt") == trained


@pytest.mark.parametrize("write", [_state_dict, _module])
def test_a_converted_file_is_not_a_restored_one(shop: Shop, write: Any, tmp_path: Path) -> None:
    torch.save({"other": torch.ones(3)}, tmp_path / "other.pt")
    ptbin.convert(str(tmp_path / "other.pt"), shop.uri("last.pt"), dest_options=shop.options)
    before = shop.read("last.pt")
    with pytest.raises(OutputExistsError, match="does not say that ptbin restored it"):
        write(shop, "last.pt")
    assert shop.read("last.pt") == before


def test_what_a_killed_run_left_is_finished(shop: Shop) -> None:
    """The output was stored, its manifest not yet: the very bytes that a rerun writes."""
    _state_dict(shop, "last.pt")
    store, path = open_store(shop.uri("last.pt.manifest.json"), shop.options)
    store.delete(path)
    _state_dict(shop, "last.pt")
    assert ptbin.verify(shop.uri("last.pt.manifest.json"), storage_options=shop.options) == []


def test_a_killed_run_s_output_is_replaced_though_its_source_has_changed(shop: Shop, tmp_path: Path) -> None:
    """By its claim: a file next to it, or what an object of S3 carries."""
    source = str(tmp_path / "source.pt")
    ptbin.stage(source, shop.uri("last.bin"), dest_options=shop.options)
    torch.save({"weight": torch.zeros(3)}, source)
    ptbin.convert(source, shop.uri("last.bin"), dest_options=shop.options)
    assert ptbin.verify(shop.uri("last.bin.manifest.json"), storage_options=shop.options) == []
    assert shop.names() == {"last.bin", "last.bin.manifest.json"}


def test_what_another_program_wrote_over_a_killed_run_s_output_stays(shop: Shop, tmp_path: Path) -> None:
    source = str(tmp_path / "source.pt")
    ptbin.stage(source, shop.uri("last.bin"), dest_options=shop.options)
    shop.put("last.bin", b"mine")
    with pytest.raises(OutputExistsError, match="no manifest of ptbin's"):
        ptbin.convert(source, shop.uri("last.bin"), dest_options=shop.options)
    assert shop.read("last.bin") == b"mine"


def test_an_object_s_claim_holds_for_its_place_and_source_alone(moto_s3: S3Endpoint, tmp_path: Path) -> None:
    """A copy inside the store takes the metadata along, and is somebody's file all the same."""
    for name, value in (("one.pt", 1.0), ("two.pt", 2.0)):
        torch.save({"weight": torch.full((30,), value)}, tmp_path / name)
    bucket, options = moto_s3.make_bucket(), moto_s3.storage_options
    ptbin.stage(str(tmp_path / "one.pt"), f"s3://{bucket}/a.bin", dest_options=options)
    store = moto_s3.store()
    assert store.claim_of(f"{bucket}/a.bin")
    store.client.call("copy_object", "a.bin", Bucket=bucket, Key="b.bin", CopySource=f"{bucket}/a.bin")
    assert store.claim_of(f"{bucket}/b.bin") == store.claim_of(f"{bucket}/a.bin")
    for dest in ("a.bin", "b.bin"):
        with pytest.raises(OutputExistsError):
            ptbin.convert(str(tmp_path / "two.pt"), f"s3://{bucket}/{dest}", dest_options=options)


def test_a_store_s_own_metadata_stays_beside_the_claim(moto_s3: S3Endpoint, tmp_path: Path) -> None:
    torch.save(STATE_DICT, tmp_path / "one.pt")
    bucket = moto_s3.make_bucket()
    options = {**moto_s3.storage_options, "s3_additional_kwargs": {"Metadata": {"team": "vision"}}}
    ptbin.convert(str(tmp_path / "one.pt"), f"s3://{bucket}/a.bin", dest_options=options)
    answer = moto_s3.store().client.call("head_object", "a.bin", Bucket=bucket, Key="a.bin")
    assert answer["Metadata"]["team"] == "vision"
    assert len(answer["Metadata"]) == 2


def test_companions_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    torch.save(STATE_DICT, tmp_path / "hub" / "pytorch_model.bin")
    (tmp_path / "hub" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"mine": 1}')
    with pytest.raises(OutputExistsError, match=r"config\.json"):
        ptbin.convert(
            str(tmp_path / "hub" / "pytorch_model.bin"),
            str(tmp_path / "out" / "pytorch_model.bin"),
            ConvertOptions(layout="hf"),
        )
    assert (tmp_path / "out" / "config.json").read_text() == '{"mine": 1}'


# -- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", ["mine.bin", "other.bin", "last.part.bin", "last.bin.intoto.json"])
def test_a_manifest_that_lists_somebody_else_s_file_deletes_nothing(theirs: str, tmp_path: Path) -> None:
    """Anybody may write a manifest, and list any file with its true digest."""
    source, dest, other = tmp_path / "last.pt", tmp_path / "last.bin", tmp_path / theirs
    torch.save(STATE_DICT, source)
    ptbin.convert(source, dest)
    other.write_bytes(dest.read_bytes())
    if theirs == "last.part.bin":  # an output by itself, of last.part.pt
        ptbin.convert(source, other)
    told = tmp_path / "last.bin.manifest.json"
    manifest = json.loads(told.read_text())
    manifest["outputs"].append({**manifest["outputs"][0], "path": theirs})
    manifest["provenance"] = "last.bin.intoto.json"
    told.write_text(json.dumps(manifest))

    torch.save({"weight": torch.zeros(3)}, source)
    with contextlib.suppress(PtbinError):
        ptbin.convert(source, dest)
    assert other.exists()


def test_the_command_refuses_and_says_how_to_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": STATE_DICT, "optimizer": {"m": torch.zeros(9)}}, tmp_path / "last.pt")
    ptbin.convert(str(tmp_path / "last.pt"), str(tmp_path / "w" / "last.bin"))
    words = ["restore", str(tmp_path / "w" / "last.bin"), str(tmp_path / "last.pt")]
    before = (tmp_path / "last.pt").read_bytes()
    assert run([*words, "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["problems"][0]["reason"] == "output_exists"
    assert run([*words, "--dry-run", "--json"]) == 1
    planned = json.loads(capfd.readouterr().out)
    assert planned["restore"] == []
    assert planned["problems"][0]["reason"] == "output_exists"
    assert (tmp_path / "last.pt").read_bytes() == before
    assert run([*words, "--dry-run", "--force", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["restore"][0]["replaces"] is True
    assert (tmp_path / "last.pt").read_bytes() == before
    assert run([*words, "--force", "-q"]) == 0
    assert list(torch.load(tmp_path / "last.pt", weights_only=True)) == list(STATE_DICT)


def test_a_dry_run_over_a_store_marks_what_would_be_replaced(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights, dest = tmp_path / "weights", tmp_path / "dest"
    torch.save(STATE_DICT, tmp_path / "source.pt")
    for name in ("new", "ours", "current", "theirs"):
        ptbin.convert(str(tmp_path / "source.pt"), str(weights / f"{name}.bin"))
    for name in ("ours", "current"):
        ptbin.restore(str(weights / f"{name}.bin"), str(dest / f"{name}.pt"))
    torch.save(dict.fromkeys("ab", torch.ones(2)), tmp_path / "other.pt")
    ptbin.convert(str(tmp_path / "other.pt"), str(weights / "ours.bin"))
    (dest / "theirs.pt").write_bytes(b"mine")
    assert run(["restore", str(weights), str(dest), "--dry-run", "--json"]) == 1
    planned = json.loads(capfd.readouterr().out)
    found = {Path(row["dest"]).name: row["replaces"] for row in planned["restore"]}
    assert found == {"new.pt": False, "ours.pt": True}
    assert [Path(uri).name for uri in planned["up_to_date"]] == ["current.bin"]
    assert [(Path(p["source"]).name, p["reason"]) for p in planned["problems"]] == [
        ("theirs.bin", "output_exists")
    ]
    assert run(["restore", str(weights), str(dest), "--dry-run"]) == 1
    said = capfd.readouterr().out
    assert "of them replace 1, up to date 1, refused 1; nothing was written" in said
    assert sorted(p.name for p in dest.iterdir() if p.suffix == ".pt") == [
        "current.pt",
        "ours.pt",
        "theirs.pt",
    ]


@pytest.mark.parametrize(
    ("dest", "said"),
    [
        ("y.safetensors", "ptbin convert SOURCE"),
        ("y.bin", "ptbin convert SOURCE"),
        ("y.onnx", "for a directory write"),
        ("y.pt2", "needs --model"),
    ],
)
def test_a_suffix_means_what_it_says(
    dest: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(STATE_DICT, tmp_path / "x.bin")
    assert run(["restore", str(tmp_path / "x.bin"), str(tmp_path / dest)]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / dest).exists()


@pytest.mark.parametrize("dest", ["dir", "dir.pt/", "v1.2", "there.pt"])
def test_a_directory_is_one_whatever_its_name(dest: str, tmp_path: Path) -> None:
    torch.save(STATE_DICT, tmp_path / "x.bin")
    (tmp_path / "there.pt").mkdir()
    assert (
        run(["restore", str(tmp_path / "x.bin"), str(tmp_path / dest) + "/" * dest.endswith("/"), "-q"]) == 0
    )
    assert (tmp_path / dest / "x.pt").is_file()


def test_the_engine_names_no_file_wrongly(tmp_path: Path) -> None:
    torch.save(STATE_DICT, tmp_path / "x.bin")
    with pytest.raises(UsageError, match="ptbin convert"):
        ptbin.restore(str(tmp_path / "x.bin"), str(tmp_path / "y.safetensors"))


@pytest.mark.parametrize("letters", [238, 251])
def test_a_name_too_long_for_its_manifest_is_refused_before_anything_is_written(
    tmp_path: Path, letters: int
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    torch.save({"w": torch.ones(2)}, source / f"{'x' * letters}.pt")
    result = ptbin.convert_directory(source, out)
    assert [problem["reason"] for problem in result.problems] == ["storage_error"]
    assert "choose a shorter name" in result.problems[0]["detail"]
    assert [path.name for path in out.iterdir()] == ["_ptbin"]


def test_a_claim_that_a_power_failure_emptied_does_not_stop_the_rerun(tmp_path: Path) -> None:
    torch.save(STATE_DICT, tmp_path / "a.pt")
    output = tmp_path / "a.bin"
    ptbin.convert(tmp_path / "a.pt", output)
    made = output.read_bytes()
    (tmp_path / "a.bin.manifest.json").unlink()
    (tmp_path / f"a.bin{ASIDE_SUFFIX}").write_bytes(b"")
    ptbin.convert(tmp_path / "a.pt", output)
    assert output.read_bytes() == made
    assert ptbin.verify(f"{output}.manifest.json") == []
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.bin", "a.bin.manifest.json", "a.pt"]


def test_a_new_output_waits_for_the_disk_four_times_and_a_replaced_one_for_its_claim_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(STATE_DICT, tmp_path / "a.pt")
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", flushed.append)
    ptbin.convert(tmp_path / "a.pt", tmp_path / "a.bin")
    assert len(flushed) == 4  # output and manifest, and twice the folder
    ptbin.convert(tmp_path / "a.pt", tmp_path / "a.bin", ConvertOptions(drop=("bias",)))
    assert len(flushed) == 4 + 6
