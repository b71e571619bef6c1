"""The convert flow on a real (embedded) server: outcomes, states, retries, records, history, secrets."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ptbin
from flows import stages
from flows.convert import convert
from flows.prefect.orchestrator import Orchestrator
from ptbin.conversion import publish_at
from ptbin.errors import StorageError, UsageError
from ptbin.registries.verification import verify_records
from ptbin.runs.retrying import RETRIES
from ptbin.runs.run_ids import new_run_id
from ptbin.stores import Place, place_of
from tasks.live import LiveRun, open_live_run

Database = Callable[[str], list[tuple[Any, ...]]]

pytestmark = pytest.mark.usefixtures("server")


def run(source: Path, dest: Path, **parameters: Any) -> tuple[Any, dict[str, Any]]:
    with open_live_run(LiveRun(new_run_id())) as live:
        state = convert(
            source=str(source), dest=str(dest), run_id=live.run_id, return_state=True, **parameters
        )
    return state, live.summary


@contextlib.contextmanager
def staging(monkeypatch: pytest.MonkeyPatch, trouble: Callable[[str], None]) -> Iterator[Counter[str]]:
    """Let `trouble(name)` raise before a source is staged; counts the attempts on each."""
    attempts: Counter[str] = Counter()
    real = ptbin.stage

    def stage(source: Place, *arguments: Any, **keywords: Any) -> Any:
        name = source.name
        attempts[name] += 1
        trouble(name)
        return real(source, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("ptbin.runs.steps.stage", stage)
        patch.setattr(stages, "retry_delay", lambda retry: 0.01 * retry)
        yield attempts


def test_one_bad_checkpoint_stops_no_other(source: Path, tmp_path: Path) -> None:
    state, summary = run(source, tmp_path / "out")
    assert state.is_failed()
    assert (state.message or "").splitlines()[
        0
    ] == "converted 12, up to date 0, rejected 4, failed 0, not checkpoints 1"
    reasons = {Path(problem["source"]).name: problem["reason"] for problem in summary["problems"]}
    assert reasons == {
        "hostile.pkl": "unsafe_pickle",
        "truncated.pt": "corrupt_archive",
        "twin.pt": "output_collision",
        "twin.ckpt": "output_collision",
    }
    assert len(list((tmp_path / "out").rglob("*.bin"))) == 12
    assert sorted(summary["manifests"]) == sorted(map(str, (tmp_path / "out").rglob("*.manifest.json")))


def test_a_rerun_converts_only_what_is_new_and_force_everything(good_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(good_source, out)[0].message.startswith("converted 6, up to date 0")
    (out / "3.bin").unlink()
    state, _ = run(good_source, out)
    assert state.is_completed()
    assert state.message == "converted 1, up to date 5, rejected 0, failed 0"
    assert run(good_source, out, force=True)[0].message.startswith("converted 6, up to date 0")


def test_the_run_record_can_be_checked_by_others(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, summary = run(source, out)
    (folder,) = (out / "_ptbin" / "runs").iterdir()
    assert folder.name == summary["run_id"]
    assert {path.name for path in folder.iterdir()} == {"run.json", "report.html", "SHA256SUMS"}
    check = ["sha256sum", "--strict", "-c", f"_ptbin/runs/{folder.name}/SHA256SUMS"]
    assert subprocess.run(check, cwd=out, capture_output=True).returncode == 0
    record = json.loads((folder / "run.json").read_text())
    outcomes = Counter(row["outcome"] for row in record["checkpoints"])
    assert outcomes == {"converted": 12, "rejected": 4, "not_a_checkpoint": 1}
    assert record["prefect_flow_run_id"] == summary["flow_run_id"]


def test_without_digests_of_files_the_checksum_list_names_those_of_tensors(
    good_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    state, summary = run(good_source, out, file_digest="none")
    assert state.is_completed()
    (checksums,) = out.glob("_ptbin/runs/*/SHA256SUMS")
    lines = checksums.read_text().splitlines()
    rows = [
        f"# {row['sha256']}  {row['file']}#{row['name']}"
        for manifest in sorted(summary["manifests"])
        for row in json.loads(Path(manifest).read_text())["tensors"]
    ]
    assert lines == rows
    assert verify_records(place_of(out), {}) == []
    assert run(good_source, out)[0].message.startswith("converted 0, up to date 6")


def test_what_a_store_may_do_better_later_is_tried_again_alone(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: Counter[str] = Counter()

    def trouble(name: str) -> None:
        tried[name] += 1
        if name == "2.pt" and tried[name] <= RETRIES:
            raise StorageError("503 slow down", transient=True)

    with staging(monkeypatch, trouble) as attempts:
        state, _ = run(good_source, tmp_path / "out")
    assert state.message == "converted 6, up to date 0, rejected 0, failed 0"
    assert attempts.pop("2.pt") == RETRIES + 1
    assert set(attempts.values()) == {1}  # what was finished was not redone


@pytest.mark.parametrize(("transient", "expected"), [(True, RETRIES + 1), (False, 1)])
def test_a_store_that_stays_down_fails_only_what_it_held(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transient: bool, expected: int
) -> None:
    def trouble(name: str) -> None:
        if name == "2.pt":
            raise StorageError("connection reset", transient=transient)

    with staging(monkeypatch, trouble) as attempts:
        state, summary = run(good_source, tmp_path / "out")
    assert (state.message or "").splitlines()[0] == "converted 5, up to date 0, rejected 0, failed 1"
    assert attempts["2.pt"] == expected
    assert summary["problems"][0]["reason"] == "storage_error"


def test_a_proof_is_tried_again_without_writing_again(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs: Counter[str] = Counter()
    real = publish_at

    def publish(draft: Any, *arguments: Any) -> Any:
        proofs[draft.dest_uri] += 1
        if draft.dest_uri.endswith("2.bin") and proofs[draft.dest_uri] == 1:
            raise StorageError("timed out", transient=True)
        return real(draft, *arguments)

    monkeypatch.setattr("ptbin.runs.steps.publish_at", publish)
    with staging(monkeypatch, lambda _: None) as attempts:
        state, _ = run(good_source, tmp_path / "out")
    assert state.is_completed()
    assert set(attempts.values()) == {1}
    assert sorted(proofs.values()) == [1, 1, 1, 1, 1, 2]


def test_a_task_run_that_dies_fails_its_own_batch(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies:
        def to_json(self) -> str:
            raise MemoryError("in the task itself")

    real = ptbin.stage

    def stage(source: Place, *arguments: Any, **keywords: Any) -> Any:
        return Dies() if source.name == "2.pt" else real(source, *arguments, **keywords)

    monkeypatch.setattr("ptbin.runs.steps.stage", stage)
    state, summary = run(good_source, tmp_path / "out")
    assert (state.message or "").splitlines()[0] == "converted 5, up to date 0, rejected 0, failed 1"
    assert summary["problems"][0]["reason"] == "internal_error"
    assert "in the task itself" in summary["problems"][0]["detail"]


def test_fail_fast_begins_nothing_new(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trouble(name: str) -> None:
        if name == "0.pt":
            raise StorageError("no")

    with staging(monkeypatch, trouble) as attempts:
        state, _ = run(good_source, tmp_path / "out", fail_fast=True, workers=1)
    assert attempts.total() < 6
    assert state.message.startswith(f"converted {attempts.total() - 1}, up to date 0, rejected 0, failed 1")
    assert state.message.splitlines()[0].endswith(f"not tried {6 - attempts.total()}")


def test_a_run_record_that_cannot_be_written_loses_no_output(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr("ptbin.runs.ending.write_record_files", refuse)
    state, summary = run(good_source, tmp_path / "out")
    assert state.is_failed()
    assert state.message == (
        "converted 6, up to date 0, rejected 0, failed 0, storage_error: run record: disk full"
    )
    assert summary["converted"] == 6
    assert not summary["succeeded"]


@pytest.mark.parametrize("where", ["", "missing"])
def test_a_wrong_call_writes_nothing(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    state, summary = run(tmp_path / "empty" / where, tmp_path / "out")
    assert state.is_failed()
    assert isinstance(state.result(raise_on_failure=False), UsageError)
    assert "message" not in summary
    assert not (tmp_path / "out").exists()


def test_the_history_is_complete(
    source: Path, tmp_path: Path, server: Orchestrator, database: Database
) -> None:
    _, summary = run(source, tmp_path / "out")
    assert server.settle(summary["flow_run_id"], summary["task_runs"])
    rows = database(
        f"select state_type, count(*) from task_run where flow_run_id = '{summary['flow_run_id']}' group by 1"
    )
    assert rows == [("COMPLETED", summary["task_runs"])]
    assert summary["task_runs"] > 10
    # One more than there are is never reported as complete: the wait does look.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.prefect.orchestrator.RECORDING_SECONDS", 0.3)
        assert not server.settle(summary["flow_run_id"], summary["task_runs"] + 1)


def test_the_table_artifact_lists_every_checkpoint(source: Path, tmp_path: Path, database: Database) -> None:
    _, summary = run(source, tmp_path / "out")
    ((key, data),) = database(
        f"select key, data from artifact where flow_run_id = '{summary['flow_run_id']}' and type = 'table'"
    )
    rows = json.loads(json.loads(data))
    assert key == "ptbin-convert"
    assert Counter(row["outcome"] for row in rows) == {"converted": 12, "rejected": 4, "not a checkpoint": 1}
    assert rows[0]["reason"]


def test_storage_options_never_reach_the_server(
    good_source: Path, tmp_path: Path, server: Orchestrator, prefect_home: Path
) -> None:
    secret = "hunter2-in-storage-options"
    seen: list[Any] = []
    with (
        pytest.MonkeyPatch.context() as patch,
        open_live_run(LiveRun(new_run_id(), {"secret": secret}, {"password": secret})) as live,
    ):
        real = ptbin.stage

        def stage(*arguments: Any, **keywords: Any) -> Any:
            seen.append(arguments[0].store.storage_options)
            return real(*arguments, **keywords)

        patch.setattr("ptbin.runs.steps.stage", stage)
        state = convert(str(good_source), str(tmp_path / "out"), run_id=live.run_id, return_state=True)
    assert state.is_completed()
    assert seen[0] == {"secret": secret}
    assert server.settle(live.summary["flow_run_id"], live.summary["task_runs"])
    stored = b"".join(path.read_bytes() for path in prefect_home.rglob("*") if path.is_file())
    assert str(good_source).encode() in stored  # that search would have found it
    assert secret.encode() not in stored
    record = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert secret.encode() not in record


def test_options_by_value_are_refused_and_not_repeated(good_source: Path, tmp_path: Path) -> None:
    state = convert(
        str(good_source), str(tmp_path / "out"), source_options='{"secret": "oops"}', return_state=True
    )
    assert state.is_failed()
    assert "oops" not in str(state.message)
    assert "block:NAME or env:NAME" in str(state.message)


def test_options_are_found_where_a_reference_says(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.blocks.system import Secret

    seen: list[Any] = []
    real = ptbin.stage

    def stage(*arguments: Any, **keywords: Any) -> Any:
        seen.append(tuple(place.store.storage_options for place in arguments[:2]))
        return real(*arguments, **keywords)

    monkeypatch.setattr("ptbin.runs.steps.stage", stage)
    monkeypatch.setenv("MY_OPTIONS", '{"from": "env"}')
    block: Any = Secret
    block(value={"from": "block"}).save("my-options")
    state = convert(
        str(good_source),
        str(tmp_path / "out"),
        source_options="env:MY_OPTIONS",
        dest_options="block:my-options",
        return_state=True,
    )
    assert state.is_completed()
    assert seen[0] == ({"from": "env"}, {"from": "block"})
