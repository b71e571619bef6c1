"""What flows return, also failed ones; and that a run without Prefect leaves what the flow leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from flows.convert import convert
from flows.migrate import migrate
from flows.restore import restore
from flows.sync import sync
from flows.verify import verify
from ptbin.catalog.finished import iter_segment
from ptbin.history.failures import read_unconverted
from ptbin.history.records import iter_runs
from ptbin.stores import place_of

pytestmark = [pytest.mark.starts_servers, pytest.mark.usefixtures("server")]

OF_THE_RUN = ("run_id", "started_at", "finished_at", "verification")


def manifests(out: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in out.rglob("*.manifest.json"):
        manifest = json.loads(path.read_bytes())
        for name in OF_THE_RUN:
            del manifest[name]
        found[path.relative_to(out).as_posix()] = manifest
    return found


def outputs(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.bin")}


def index(out: Path) -> set[tuple[Any, ...]]:
    rows = [row for path in (out / "_ptbin" / "index").iterdir() for row in iter_segment(place_of(path))]
    return {(row.manifest, row.digest, row.level, row.outputs, row.source) for row in rows}


def history(out: Path) -> list[tuple[Any, ...]]:
    names = (
        "kind",
        "source",
        "converted",
        "up_to_date",
        "rejected",
        "failed",
        "new",
        "resolved",
        "selection",
    )
    facts = [run.facts for run in iter_runs(out)]
    return [
        tuple(json.dumps(found.get(name)) for name in (*names, "by_reason", "options")) for found in facts
    ]


def unconverted(out: Path) -> set[tuple[str, ...]]:
    rows = read_unconverted(out)
    return {(r.source, r.state, r.outcome, r.reason, r.detail.replace(str(out), "DEST")) for r in rows}


def test_a_run_without_prefect_leaves_what_the_flow_leaves(source: Path, tmp_path: Path) -> None:
    out = {name: tmp_path / "places" / name / "out" for name in ("flow", "function")}
    (tmp_path / "places").mkdir()
    for round_ in range(2):
        state = convert(str(source), str(out["flow"]), return_state=True)
        result = ptbin.convert_directory(source, out["function"])
        raised = state.result(raise_on_failure=False)
        assert isinstance(raised, ptbin.RunFailedError)
        sizes = ("written_bytes", "read_bytes", "source_bytes", "copied_bytes")
        assert {k: v for k, v in raised.result.counts.items() if k not in sizes} == {
            k: v for k, v in result.counts.items() if k not in sizes
        }
        keys = ("source", "reason", "novelty")
        told = [[{k: row[k] for k in keys} for row in each.problems] for each in (raised.result, result)]
        assert told[0] == told[1]
        for look in (outputs, manifests, index, history, unconverted):
            assert look(out["flow"]) == look(out["function"]), f"{look}, round {round_}"
        torch.save({"w": torch.zeros(4)}, source / "run" / "00.pt")
        (source / "twin.ckpt").unlink(missing_ok=True)


def test_each_goes_on_from_where_the_other_one_was(good_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ptbin.convert_directory(good_source, out, include=["[0-2].pt"]).counts["converted"] == 3
    result = convert(str(good_source), str(out))
    assert (result.counts["converted"], result.counts["up_to_date"]) == (3, 3)
    assert ptbin.convert_directory(good_source, out).counts["up_to_date"] == 6


def test_every_flow_returns_its_result(good_source: Path, tmp_path: Path) -> None:
    out, back, mirror = (str(tmp_path / name) for name in ("out", "back", "mirror"))
    for kind, result in {
        "convert": convert(good_source, Path(out)),  # paths, too
        "restore": restore(out, back),
        "sync": sync(str(good_source), mirror),
        "verify": verify(out),
    }.items():
        assert isinstance(result, ptbin.RunResult)
        assert (result.kind, result.succeeded, result.problems) == (kind, True, ())
        assert result.counts["proven" if kind == "verify" else "converted"] == 6
        assert kind == "verify" or (Path(result.record).is_file() and Path(result.report).is_file())
        assert result.run_id
        assert result.message


def test_a_failed_flow_raises_its_result(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ptbin.RunFailedError, match="converted 12") as caught:
        convert(str(source), str(tmp_path / "out"))
    result = caught.value.result
    assert (result.counts["converted"], result.counts["rejected"], result.succeeded) == (12, 4, False)
    assert {problem["reason"] for problem in result.problems} >= {"unsafe_pickle", "output_collision"}
    assert result.run_id in result.record
    (tmp_path / "out" / "orphan.bin").write_bytes(b"x")
    state = verify(str(tmp_path / "out"), return_state=True)
    found = state.result(raise_on_failure=False)
    assert isinstance(found, ptbin.RunFailedError)
    assert [problem["reason"] for problem in found.result.problems] == ["no_manifest"]


def test_a_migration_returns_its_result(good_source: Path, tmp_path: Path) -> None:
    version = tmp_path / "models" / "net" / "1"
    version.mkdir(parents=True)
    (version / "model.pt").write_bytes((good_source / "0.pt").read_bytes())
    result = migrate(str(tmp_path / "models"), str(tmp_path / "dest"))
    assert (result.kind, result.counts["migrated"], result.succeeded) == ("migrate", 1, True)
    assert Path(result.record).is_file()
