"""Damaged outputs: `sync --checksum` finds and repairs them; what `verify` found is made anew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import ptbin
from flows.cli.app import run as run_command
from flows.convert import convert
from flows.sync import sync
from flows.verify import verify
from ptbin.runs.run_ids import new_run_id
from tasks.live import LiveRun, open_live_run

SCHEMA = json.loads(Path(str(ptbin.__file__)).with_name("manifest.schema.json").read_text())


def run(flow: Any, *places: Path, **parameters: Any) -> dict[str, Any]:
    names = ("source", "dest") if len(places) == 2 else ("dest",)
    with open_live_run(LiveRun(new_run_id())) as live:
        named = dict(zip(names, map(str, places), strict=True))
        flow(**named, **parameters, run_id=live.run_id, return_state=True)
    return live.summary


def flip(path: Path, *, keeps_time: bool = False) -> bytes:
    """Turn one byte in the middle of a file over; what it held before."""
    before, times = path.read_bytes(), path.stat()
    data = bytearray(before)
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    if keeps_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return before


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("keeps_time", [False, True])
def test_checksum_reads_outputs_and_repairs_them(
    good_source: Path, tmp_path: Path, *, keeps_time: bool
) -> None:
    out = tmp_path / "out"
    run(sync, good_source, out)
    before = flip(out / "3.bin", keeps_time=keeps_time)
    summary = run(sync, good_source, out, checksum=True)
    assert (summary["converted"], summary["up_to_date"], summary["problems"]) == (1, 5, [])
    assert (out / "3.bin").read_bytes() == before
    assert run(verify, out)["succeeded"]
    assert run(sync, good_source, out, checksum=True)["up_to_date"] == 6


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("flow", [sync, convert])
def test_what_verify_found_damaged_is_made_anew(good_source: Path, tmp_path: Path, flow: Any) -> None:
    out = tmp_path / "out"
    run(convert, good_source, out)
    before = {name: (out / name).read_bytes() for name in ("1.bin", "2.bin", "3.bin")}
    flip(out / "1.bin")
    (out / "2.bin").write_bytes(before["2.bin"][:-9])
    (out / "3.bin").unlink()
    assert run(verify, out)["failed"] == 3
    jsonschema.validate(json.loads((out / "1.bin.manifest.json").read_text()), SCHEMA)
    summary = run(flow, good_source, out)
    assert (summary["converted"], summary["up_to_date"], summary["problems"]) == (3, 3, [])
    assert {name: (out / name).read_bytes() for name in before} == before
    assert run(verify, out)["succeeded"]


@pytest.mark.usefixtures("server")
def test_what_was_changed_after_verify_saw_it_stays(good_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(convert, good_source, out)
    flip(out / "1.bin")
    run(verify, out)
    (out / "1.bin").write_bytes(b"somebody's own weights")
    summary = run(convert, good_source, out)
    assert [problem["reason"] for problem in summary["problems"]] == ["output_exists"]
    assert (out / "1.bin").read_bytes() == b"somebody's own weights"


def test_one_output_that_verify_found_damaged_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"w": torch.arange(999.0)}, tmp_path / "in.pt")
    words = ["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.bin")]
    assert run_command(words) == 0
    before = flip(tmp_path / "out.bin")
    assert run_command(["verify", str(tmp_path / "out.bin")]) == 1
    assert run_command(words) == 0
    assert (tmp_path / "out.bin").read_bytes() == before
    assert run_command(["verify", str(tmp_path / "out.bin")]) == 0
    capsys.readouterr()
    assert run_command(words) == 0
    assert "up to date" in capsys.readouterr().out
