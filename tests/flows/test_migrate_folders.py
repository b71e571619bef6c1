"""Directory registries under strain: changed versions, strange files, kills, two sources of one DEST."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.cli.app import run as command
from flows.migrate import migrate
from flows.prefect.orchestrator import Orchestrator
from flows.verify import verify
from ptbin.registries import Layout
from ptbin.registries.folders import FolderRegistry
from ptbin.registries.record import CLAIM
from ptbin.runs.run_ids import new_run_id
from ptbin.stores import open_store
from tasks.live import LiveRun, open_live_run
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import moto_s3

__all__ = ["moto_s3"]

pytestmark = pytest.mark.usefixtures("server")


def put(path: Path, value: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"w": torch.full((8,), value)}, path)


def weight(path: Path) -> float:
    found: torch.Tensor = torch.load(path, weights_only=True)["w"]
    return float(found[0])


def run(source: Any, dest: Any, options: dict[str, Any] | None = None, **wishes: Any) -> dict[str, Any]:
    live = LiveRun(new_run_id(), options or {}, options or {})
    with open_live_run(live):
        state = migrate(str(source), str(dest), run_id=live.run_id, return_state=True, **wishes)
    if "message" not in live.summary:
        state.result()
    return live.summary


def outcomes(summary: dict[str, Any]) -> dict[str, str]:
    return {f"{row['model']}/{row['version']}": row["outcome"] for row in summary["versions"]}


def issues(dest: Path) -> list[dict[str, str]]:
    live = LiveRun(new_run_id())
    with open_live_run(live):
        verify(str(dest), run_id=live.run_id, return_state=True)
    found: list[dict[str, str]] = live.summary["issues"]
    return found


def record(dest: Path, model: str = "net") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((dest / model / "registry.json").read_text())
    return found


def files(dest: Path) -> set[str]:
    """All but the runs' own: records, leases, the list of what is not converted."""
    own = {"runs", "leases", "unconverted.jsonl"}
    return {
        path.relative_to(dest).as_posix()
        for path in dest.rglob("*")
        if path.is_file() and not ("_ptbin" in path.parts and own.intersection(path.parts))
    }


def test_nothing_of_an_earlier_state_stays_beside_the_new_one(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    put(source / "net/1/model.pt")
    put(source / "net/1/same.pt", 3.0)
    (source / "net/1/old.txt").write_text("old")
    run(source, dest)
    (dest / "net/1/model.sig").write_text("somebody's own")
    same = (dest / "net/1/same.bin").stat()

    (source / "net/1/model.pt").unlink()
    (source / "net/1/old.txt").unlink()
    put(source / "net/1/weights.pt", 2.0)
    assert outcomes(run(source, dest)) == {"net/1": "migrated"}
    assert files(dest) == {
        "net/registry.json",
        "net/1/model.sig",
        *(f"net/1/{name}.bin{suffix}" for name in ("weights", "same") for suffix in ("", ".manifest.json")),
    }
    assert weight(dest / "net/1/weights.bin") == 2.0
    assert (dest / "net/1/same.bin").stat().st_mtime_ns == same.st_mtime_ns, "what is up to date stays"
    assert issues(dest) == []
    assert outcomes(run(source, dest)) == {"net/1": "up_to_date"}


def test_a_changed_version_that_turns_out_bad_leaves_the_earlier_state_whole(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    put(source / "net/1/a.pt")
    put(source / "net/1/b.pt")
    run(source, dest)
    before = {name: (dest / name).read_bytes() for name in files(dest)}
    put(source / "net/1/a.pt", 2.0)
    put(source / "net/1/b.pt", 2.0)
    data = bytearray((source / "net/1/b.pt").read_bytes())
    data[data.index(torch.full((8,), 2.0).numpy().tobytes()) + 5] ^= 1
    (source / "net/1/b.pt").write_bytes(data)
    assert outcomes(run(source, dest)) == {"net/1": "rejected"}
    assert {name: (dest / name).read_bytes() for name in files(dest)} == before


KILLED = """
import os, sys
import ptbin.registries.folders as folders
real, calls = getattr({owner}, {name!r}), []
def killed(*args, **kwargs):
    found = real(*args, **kwargs)
    if {name!r} != "write_bytes" or args[0].name == folders.RECORD:
        calls.append(1)
    if len(calls) == {count}:
        os.kill(os.getpid(), 9)
    return found
setattr({owner}, {name!r}, killed)
from flows.cli import main
main()
"""


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        ("folders.FolderRegistry", "place", 1),
        ("folders.Place", "write_bytes", 1),
        ("folders", "copy_file", 1),
        ("folders.Place", "write_bytes", 2),
        ("folders.FolderRegistry", "register", 1),
    ],
)
def test_killed_while_a_version_takes_the_place_of_its_earlier_state(
    owner: str, name: str, count: int, tmp_path: Path, server: Orchestrator
) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    put(source / "net/1/model.pt")
    put(source / "net/1/gone.pt")
    run(source, dest)
    (source / "net/1/gone.pt").unlink()
    put(source / "net/1/model.pt", 2.0)
    code = KILLED.format(owner=owner, name=name, count=count)
    done = subprocess.run(
        [sys.executable, "-c", code, "migrate", str(source), str(dest)],
        env=os.environ | {"PREFECT_API_URL": server.api_url},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == -9, done.stderr
    listed = record(dest)["versions"]
    if listed:
        fingerprint = json.loads((dest / "net/1/model.bin.manifest.json").read_text())["registry"]["origin"]
        assert listed[0]["origin"]["fingerprint"] == fingerprint["fingerprint"], "what counts is whole"
    assert set(outcomes(run(source, dest)).values()) <= {"migrated", "up_to_date"}
    assert {name for name in files(dest) if not name.endswith(CLAIM)} == {
        *("net/registry.json", "net/1/model.bin", "net/1/model.bin.manifest.json")
    }
    assert weight(dest / "net/1/model.bin") == 2.0
    assert [row["version"] for row in record(dest)["versions"]] == ["1"]
    assert issues(dest) == []


def test_a_claim_that_a_killed_run_left_costs_no_registered_version(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    put(source / "net/1/model.pt")
    run(source, dest)
    claim = {"model": "net", "version": "1"}
    (dest / "net/1" / CLAIM).write_text(json.dumps(claim))
    assert issues(dest) == []
    put(source / "net/1/model.pt", 2.0)
    data = (source / "net/1/model.pt").read_bytes()
    (source / "net/1/model.pt").write_bytes(data[:-30])
    assert outcomes(run(source, dest)) == {"net/1": "rejected"}
    registry = FolderRegistry(str(dest), Layout())
    there = registry.existing(["net"])["net"]
    place = registry.place(there, there.versions[0], "1", "f" * 32)
    registry.abandon(place)
    assert weight(dest / "net/1/model.bin") == 1.0


def test_a_source_is_the_same_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a/net/1/model.pt", 1.0)
    run("a", "dest")
    put(tmp_path / "a/net/1/model.pt", 2.0)
    assert outcomes(run(f"file://{tmp_path}/a/", tmp_path / "dest")) == {"net/1": "migrated"}
    assert weight(tmp_path / "dest/net/1/model.bin") == 2.0


def test_a_second_source_does_not_write_over_the_first(tmp_path: Path) -> None:
    put(tmp_path / "a/net/1/model.pt", 1.0)
    put(tmp_path / "b/net/1/model.pt", 2.0)
    put(tmp_path / "b/net/2/model.pt", 2.0)
    run(tmp_path / "a", tmp_path / "dest")
    summary = run(tmp_path / "b", tmp_path / "dest")
    assert outcomes(summary) == {"net/1": "rejected", "net/2": "migrated"}
    assert summary["problems"][0]["reason"] == "output_collision"
    assert weight(tmp_path / "dest/net/1/model.bin") == 1.0


def test_files_of_somebody_else_stay_and_the_dry_run_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a/net/1/model.pt", 1.0)
    put(tmp_path / "a/net/2/model.pt", 2.0)
    (tmp_path / "dest/net/1").mkdir(parents=True)
    (tmp_path / "dest/net/1/model.bin").write_bytes(b"mine")
    capfd.readouterr()
    assert command(["migrate", str(tmp_path / "a"), str(tmp_path / "dest"), "--dry-run", "--json"]) == 1
    planned = json.loads(capfd.readouterr().out)
    summary = run(tmp_path / "a", tmp_path / "dest")
    for found in (planned, summary):
        (problem,) = found["problems"]
        assert problem["reason"] == "output_exists"
        assert "choose another DEST" in problem["detail"]
    assert outcomes(summary) == {"net/1": "rejected", "net/2": "migrated"}
    assert (tmp_path / "dest/net/1/model.bin").read_bytes() == b"mine"
    put(tmp_path / "a/net/2/model.pt", 3.0)
    command(["migrate", str(tmp_path / "a"), str(tmp_path / "dest"), "--dry-run", "--json"])
    rows = {row["version"]: row.get("replaces") for row in json.loads(capfd.readouterr().out)["versions"]}
    assert rows == {"1": None, "2": True}


def test_files_of_a_model_write_over_no_version_and_bring_no_pickle(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source / "net/1/pytorch_model.pt")
    (source / "net/1/config.json").write_text('{"of": "version"}')
    (source / "net/config.json").write_text('{"of": "model"}')
    (source / "net/README.md").write_text("# net")
    put(source / "net/pytorch_model.bin", 9.0)
    (source / "net/evil.pkl").write_bytes(b"cposix\nsystem\n(S'touch /tmp/never'\ntR.")
    summary = run(source, tmp_path / "flat", layout="hf:{name}")
    assert outcomes(summary) == {"net/1": "migrated"}
    flat = tmp_path / "flat/net"
    assert weight(flat / "pytorch_model.bin") == 1.0
    assert json.loads((flat / "config.json").read_text()) == {"of": "version"}
    assert (flat / "README.md").read_text() == "# net"
    assert issues(tmp_path / "flat") == []
    run(source, tmp_path / "dest")
    assert (tmp_path / "dest/net/README.md").exists()
    names = files(tmp_path / "dest")
    assert not names & {"net/evil.pkl", "net/pytorch_model.bin"}


def test_a_file_of_somebody_s_is_not_replaced_by_one_of_the_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    put(source / "net/1/model.pt")
    (source / "net/README.md").write_text("# net")
    (dest / "net").mkdir(parents=True)
    (dest / "net/README.md").write_text("mine")
    before = files(dest)
    assert command(["migrate", str(source), str(dest), "--dry-run", "--json"]) == 1
    (row,) = json.loads(capfd.readouterr().out)["versions"]
    assert (row["action"], row["reason"]) == ("refused", "output_exists")
    summary = run(source, dest)
    assert summary["problems"][0]["reason"] == "output_exists"
    assert "net/README.md" in summary["problems"][0]["detail"]
    assert files(dest) == before
    (dest / "net/README.md").unlink()
    assert outcomes(run(source, dest)) == {"net/1": "migrated"}
    (source / "net/README.md").write_text("# net, again")
    put(source / "net/2/model.pt", 2.0)
    assert outcomes(run(source, dest))["net/2"] == "migrated"
    assert (dest / "net/README.md").read_text() == "# net, again"  # a migration had brought what was there
    (dest / "net/README.md").write_text("mine")
    (source / "net/README.md").write_text("# net, at last")
    put(source / "net/3/model.pt", 3.0)
    assert outcomes(run(source, dest))["net/3"] == "rejected"
    assert (dest / "net/README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "notes.txt"], ids=["changed", "added"])
def test_a_version_whose_folder_holds_a_file_of_somebody_s_is_not_replaced(tmp_path: Path, name: str) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    put(source / "net/1/model.pt")
    (source / "net/1/config.json").write_text("{}")
    run(source, dest)
    (dest / "net/1" / name).write_text("mine")
    put(source / "net/1/model.pt", 2.0)
    (source / "net/1/notes.txt").write_text("of the source")
    summary = run(source, dest)
    assert outcomes(summary) == {"net/1": "rejected"}
    (problem,) = summary["problems"]
    assert problem["reason"] == "output_exists"
    assert name in problem["detail"]
    assert (dest / "net/1" / name).read_text() == "mine"
    assert weight(dest / "net/1/model.bin") == 1.0
    assert [row["version"] for row in record(dest)["versions"]] == ["1"]
    (dest / "net/1" / name).unlink()
    assert outcomes(run(source, dest)) == {"net/1": "migrated"}
    assert weight(dest / "net/1/model.bin") == 2.0
    assert (dest / "net/1/notes.txt").read_text() == "of the source"
    assert issues(dest) == []


def test_a_record_that_lists_somebody_s_file_deletes_nothing(tmp_path: Path) -> None:
    """Anybody may write a record; where it states no identity of a file, it vouches for nothing."""
    source, dest = tmp_path / "source", tmp_path / "dest"
    put(source / "net/1/model.pt")
    run(source, dest)
    (dest / "net/1/mine.txt").write_text("mine")
    told = json.loads((dest / "net/registry.json").read_text())
    told["versions"][0]["files"].append("mine.txt")
    del told["versions"][0]["identities"]["model.bin"]
    (dest / "net/registry.json").write_text(json.dumps(told))
    put(source / "net/1/model.pt", 2.0)
    assert outcomes(run(source, dest)) == {"net/1": "rejected"}
    assert (dest / "net/1/mine.txt").read_text() == "mine"


def test_keys_that_lead_out_of_the_registry_are_not_followed(tmp_path: Path, moto_s3: S3Endpoint) -> None:
    bucket = moto_s3.make_bucket()
    store, root = open_store(f"s3://{bucket}/reg", moto_s3.storage_options)
    put(tmp_path / "model.pt")
    store.write_bytes(f"{root}/net/1/model.pt", (tmp_path / "model.pt").read_bytes())
    store.write_bytes(f"{root}/net/x/../../../evil.txt", b"evil")
    store.write_bytes(f"{root}/net/2/../../../evil.txt", b"evil")
    store.write_bytes(f"{root}/net/2/model.pt", (tmp_path / "model.pt").read_bytes())
    dest = tmp_path / "out" / "dest"
    live = LiveRun(new_run_id(), moto_s3.storage_options, {})
    with open_live_run(live):
        migrate(
            f"s3://{bucket}/reg", str(dest), source_layout="triton", run_id=live.run_id, return_state=True
        )
    assert outcomes(live.summary)["net/1"] == "migrated"
    assert not list(tmp_path.rglob("evil.txt"))


def test_one_bad_name_or_record_stops_no_other(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("1", "2", "beta", "9" * 200):
        put(source / f"net/{name}/model.pt")
    put(source / "other/1/model.pt")
    (source / "other/registry.json").write_text('{"schema_version": 1, "name": "other", "versions": 3}')
    put(source / "third/1/model.pt")
    run(source, tmp_path / "middle", include=["third"])
    broken = json.loads((tmp_path / "middle/third/registry.json").read_text())
    broken["versions"][0]["metrics"] = [{"key": "a", "value": 1, "step": 0}]
    text = json.dumps(broken).replace('"step": 0', '"step": 1e400')
    (source / "third/registry.json").write_text(text)
    summary = run(source, tmp_path / "dest", layout="triton")
    assert outcomes(summary) == {
        "net/1": "migrated",
        "net/2": "migrated",
        "net/" + "9" * 200: "migrated",
        "net/beta": "rejected",
        "other/1": "rejected",
        "third/1": "rejected",
    }
    assert {problem["reason"] for problem in summary["problems"]} == {"unsafe_path", "registry_error"}


def test_what_trainers_leave_beside_weights_stays_behind(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source / "net/1/pytorch_model.bin")
    put(source / "net/1/../1/model.pt", 1.0)
    (source / "net/1/model.pt").unlink()
    torch.save({"state": {}, "param_groups": []}, source / "net/1/optimizer.pt")
    (source / "net/1/training_args.bin").write_bytes(pickle.dumps({"lr": 0.1}, 2))
    (source / "net/1/config.json").write_text("{}")
    (source / "tree/1").mkdir(parents=True)
    (source / "tree/1/model.pkl").write_bytes(pickle.dumps({"depth": 3}, 2))
    summary = run(source, tmp_path / "dest", layout="hf")
    assert outcomes(summary) == {"net/1": "migrated", "tree/1": "not_a_checkpoint"}
    row = next(row for row in summary["versions"] if row["model"] == "net")
    assert row["left_behind"] == ["optimizer.pt", "training_args.bin"]
    names = files(tmp_path / "dest")
    assert {"net/1/pytorch_model.bin", "net/1/config.json"} <= names
    assert not [name for name in names if "optimizer" in name or "training" in name or "tree" in name]


def test_weights_that_are_there_twice_are_converted_once(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    put(tmp_path / "source/net/1/pytorch_model.bin")
    save_file({"w": torch.ones(8)}, tmp_path / "source/net/1/model.safetensors")
    for format_, kept in (("torch", "pytorch_model.bin"), ("safetensors", "model.safetensors")):
        dest = tmp_path / format_
        assert outcomes(run(tmp_path / "source", dest, layout="hf", format=format_)) == {"net/1": "migrated"}
        assert f"net/1/{kept}.manifest.json" in files(dest)
        assert "net/1/model.safetensors" in files(dest)


def test_another_layout_than_it_has_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "source/net/1/model.pt")
    run(tmp_path / "source", tmp_path / "dest")
    summary = run(tmp_path / "source", tmp_path / "dest", layout="hf")
    assert outcomes(summary) == {"net/1": "rejected"}
    assert "--layout mirror" in summary["problems"][0]["detail"]


def test_a_record_is_found_under_a_template_that_decorates_names(tmp_path: Path) -> None:
    put(tmp_path / "source/net/1/model.pt")
    put(tmp_path / "source/net/2/model.pt")
    run(tmp_path / "source", tmp_path / "middle", layout="m-{name}/v{version}", versions="latest")
    put(tmp_path / "middle/m-net/v7/model.pt")  # nobody has registered it
    data = json.loads((tmp_path / "middle/m-net/registry.json").read_text()) | {"description": "kept"}
    (tmp_path / "middle/m-net/registry.json").write_text(json.dumps(data))
    summary = run(tmp_path / "middle", tmp_path / "dest", source_layout="m-{name}/v{version}")
    assert outcomes(summary) == {"net/2": "migrated"}
    assert record(tmp_path / "dest")["description"] == "kept"


def test_a_version_that_is_being_written_is_none_of_the_source(tmp_path: Path) -> None:
    put(tmp_path / "source/net/1/model.pt")
    put(tmp_path / "source/net/2/model.pt")
    (tmp_path / "source/net/2" / CLAIM).write_text("{}")
    assert outcomes(run(tmp_path / "source", tmp_path / "dest")) == {"net/1": "migrated"}


def test_a_pointer_among_the_files_of_a_version_is_reported(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    put(source / "net/1/model.pt")
    put(source / "net/2/model.pt", 2.0)
    (source / "net/2/tokenizer.json").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    )
    summary = run(source, dest)
    assert outcomes(summary) == {"net/1": "migrated", "net/2": "rejected"}
    assert [problem["reason"] for problem in summary["problems"]] == ["unsupported_format"]
    assert not (dest / "net/2/tokenizer.json").exists()
