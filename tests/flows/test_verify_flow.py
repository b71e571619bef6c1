"""The verify flow finds what is broken, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ptbin
from flows import stages
from flows.verify import verify
from ptbin.errors import StorageError
from ptbin.proof.verification import verify_outputs
from ptbin.runs.retrying import RETRIES
from ptbin.runs.run_ids import new_run_id
from ptbin.stores import Place
from tasks.live import LiveRun, open_live_run

pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture
def outputs(good_source: Path, tmp_path: Path) -> Path:
    for path in sorted(good_source.iterdir()):
        ptbin.convert(str(path), str(tmp_path / "out" / f"{path.stem}.bin"))
    return tmp_path / "out"


def run(dest: Path, **parameters: Any) -> tuple[Any, dict[str, Any]]:
    with open_live_run(LiveRun(new_run_id())) as live:
        return verify(str(dest), run_id=live.run_id, return_state=True, **parameters), live.summary


def test_sound_outputs_are_proven(outputs: Path) -> None:
    state, summary = run(outputs)
    assert state.is_completed()
    assert state.message == "proven 6, failed 0, outputs without a manifest 0"
    assert summary["issues"] == []


def test_a_flipped_bit_a_missing_output_and_an_orphan_are_found(outputs: Path) -> None:
    flipped = outputs / "1.bin"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    (outputs / "2.bin").unlink()
    (outputs / "3.bin.manifest.json").unlink()
    state, summary = run(outputs)
    assert state.is_failed()
    assert (state.message or "").splitlines()[0] == "proven 3, failed 2, outputs without a manifest 1"
    found = {Path(issue["uri"]).name: issue["reason"] for issue in summary["issues"]}
    assert found == {"1.bin": "checksum_mismatch", "2.bin": "missing_output", "3.bin": "no_manifest"}


def test_a_store_that_recovers_is_asked_again(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = verify_outputs

    def flaky(place: Place, **keywords: Any) -> Any:
        asked.append(place.uri)
        if "/4.bin" in place.uri and sum("/4.bin" in one for one in asked) <= RETRIES:
            raise StorageError("503", transient=True)
        return real(place, **keywords)

    monkeypatch.setattr("ptbin.runs.verifying.verify_outputs", flaky)
    monkeypatch.setattr(stages, "retry_delay", lambda retry: 0.01 * retry)
    state, _ = run(outputs)
    assert state.message == "proven 6, failed 0, outputs without a manifest 0"
    assert len(asked) == 6 + RETRIES


def test_nothing_to_verify_is_a_wrong_call(tmp_path: Path) -> None:
    state, _ = run(tmp_path)
    assert state.is_failed()
    assert "nothing to verify" in str(state.message)
