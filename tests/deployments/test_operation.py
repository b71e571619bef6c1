"""The deployments for real: server on PostgreSQL, process pool, worker; schedule, run, kill, rerun."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from ptbin.manifests.claims import claim_place
from ptbin.stores import place_of
from tests.servers.prefect_stack import FINAL, ROOT, PrefectStack, postgres_programs, prefect_stack, wait_for

pytestmark = pytest.mark.timeout(900)

# Conversions that take a while and note which checkpoint they work on, in every process of the worker's.
SLOW = """
import os, time
if "PTBIN_TEST_NOTES" in os.environ:
    import ptbin
    import ptbin.runs.steps
    really = ptbin.runs.steps.stage
    def stage(source, dest, *arguments, progress, **options):
        with open(os.environ["PTBIN_TEST_NOTES"], "a") as notes:
            notes.write(f"{source}\\n")
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            time.sleep(0.02)
            progress(0)
        return really(source, dest, *arguments, progress=progress, **options)
    ptbin.runs.steps.stage = stage
"""
COUNT = 24
CRASHED = {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectStack]:
    if postgres_programs() is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    with prefect_stack(tmp_path_factory.mktemp("stack"), postgres=True) as stack:
        site = stack.folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SLOW)
        stack.environment["PYTHONPATH"] = str(site)
        stack.environment["PTBIN_TEST_NOTES"] = str(stack.folder / "notes")
        yield stack


@pytest.fixture(autouse=True)
def nothing_left_running(stack: PrefectStack) -> Iterator[None]:
    """A run that a test leaves behind would hold the deployment's only slot, and fail those that follow."""
    yield
    for run in stack.runs():
        if run["state"]["type"] not in FINAL:
            stack.ask(f"/flow_runs/{run['id']}/set_state", CRASHED)


@pytest.fixture(scope="module")
def worker(stack: PrefectStack) -> Iterator[subprocess.Popen[bytes]]:
    """One that several tests share, until the last of them kills it: its start takes five seconds of a core.

    Tests that start their own come before the first of these or after the last: it would take their runs.
    """
    process = stack.start_worker()
    yield process
    stack.kill(process)


@pytest.fixture
def notes(stack: PrefectStack) -> Path:
    """What runs convert, and when they begin to; each conversion takes half a second."""
    file = Path(stack.environment["PTBIN_TEST_NOTES"])
    file.write_text("")
    return file


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(COUNT):
        torch.save({"state_dict": {"w": torch.full((8,), float(number))}}, source / f"{number:02}.pt")
    return {"source": str(source), "dest": str(tmp_path / "dest")}


def finished(places: dict[str, str]) -> int:
    return len(list(Path(places["dest"]).glob("*.manifest.json")))


def assert_all_there(places: dict[str, str]) -> None:
    for number in range(COUNT):
        loaded = torch.load(Path(places["dest"]) / f"{number:02}.bin", weights_only=True)
        assert torch.equal(loaded["w"], torch.full((8,), float(number)))
    assert finished(places) == COUNT


def automation(stack: PrefectStack, name: str, **changes: str) -> None:
    text = (ROOT / "deployments" / "automations" / f"{name}.yaml").read_text()
    for old, new in changes.items():
        assert old.replace("__", "-") in text
        text = text.replace(old.replace("__", "-"), new)
    file = stack.folder / f"{name}.yaml"
    file.write_text(text)
    stack.prefect("automation", "create", "--from-file", str(file))


def test_what_is_deployed_is_what_the_file_says(stack: PrefectStack) -> None:
    wanted = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    found = {item["name"]: item for item in stack.ask("/deployments/filter")}
    assert found.keys() == {item["name"] for item in wanted}
    nightly = found["convert-nightly"]
    assert nightly["parameters"]["source"] == stack.environment["PTBIN_SOURCE"]
    assert nightly["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
    described = nightly["parameter_openapi_schema"]["properties"]
    assert all(item.get("description") for item in described.values())


def test_a_killed_worker_s_run_is_marked_crashed_and_finished_by_the_next(
    stack: PrefectStack, places: dict[str, str], notes: Path, request: pytest.FixtureRequest
) -> None:
    automation(stack, "crashed-runs", **{"within: 90": "within: 40"})
    first = stack.start_worker("first")
    run = stack.run("convert/convert-nightly", **places, workers=2)
    wait_for(lambda: finished(places) > 3, 180, "some outputs")
    stack.kill(first)  # the worker and the flow's process, at once
    done = finished(places)
    assert done < COUNT
    waiting = stack.run("convert/convert-nightly", **places, workers=2)
    request.getfixturevalue("worker")
    assert stack.state(run)["type"] == "RUNNING"  # nobody has told the server
    crashed = stack.wait_for_end(run, 150)
    assert crashed["type"] == "CRASHED"
    assert "No heartbeat" in crashed["message"]
    state = stack.wait_for_end(waiting, 120)
    assert state["message"].startswith(f"converted {COUNT - done}, up to date {done}")
    assert_all_there(places)
    tried = notes.read_text().splitlines()
    assert len(tried) - COUNT <= 6  # twice only what was in flight


def test_a_schedule_fires_and_the_run_leaves_its_artifacts(
    stack: PrefectStack, worker: subprocess.Popen[bytes], places: dict[str, str]
) -> None:
    found = stack.ask("/deployments/name/convert/convert-nightly", method="GET")
    before = {run["id"] for run in stack.runs()}
    # Once: a second run would be under way when the worker is killed, and hold the deployment's only slot.
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=10)
    rule = f"DTSTART:{soon:%Y%m%dT%H%M%S}\nRRULE:FREQ=DAILY;COUNT=1"
    schedule = {"schedule": {"rrule": rule, "timezone": "UTC"}, "active": True, "parameters": places}
    (made,) = stack.ask(f"/deployments/{found['id']}/schedules", [schedule])
    try:
        ended = wait_for(
            lambda: [r for r in stack.runs() if r["id"] not in before and r["state"]["type"] == "COMPLETED"],
            180,
            "a scheduled run",
        )
    finally:
        stack.ask(f"/deployments/{found['id']}/schedules/{made['id']}", method="DELETE")
    run = ended[0]
    assert run["auto_scheduled"]
    assert run["state"]["message"].startswith(f"converted {COUNT}, ")
    assert stack.artifacts(run["id"]) == {"ptbin-convert": "table", "ptbin-convert-report": "markdown"}
    assert_all_there(places)


def test_a_killed_server_is_no_loss(
    stack: PrefectStack, worker: subprocess.Popen[bytes], places: dict[str, str], notes: Path
) -> None:
    run = stack.run("convert/convert-nightly", **places, workers=2)
    wait_for(lambda: finished(places) > 3, 180, "some outputs")
    assert stack.server is not None
    stack.kill(stack.server)
    done = finished(places)
    assert done < COUNT
    wait_for(lambda: finished(places) > done, 120, "more outputs")  # the run does not need the server
    stack.start_server()
    # It tells the server how it ended, once that is back.
    state = stack.wait_for_end(run)
    assert state["type"] == "COMPLETED"
    assert state["message"].startswith(f"converted {COUNT}, ")
    assert_all_there(places)
    assert len(notes.read_text().splitlines()) == COUNT  # nothing twice
    assert worker.poll() is None  # it takes the next test's run


def test_a_run_outlives_a_worker_that_is_killed(
    stack: PrefectStack, worker: subprocess.Popen[bytes], places: dict[str, str]
) -> None:
    run = stack.run("convert/convert-nightly", **places, workers=2)
    wait_for(lambda: finished(places) > 3, 180, "some outputs")
    worker.kill()
    worker.wait(120)
    state = stack.wait_for_end(run)
    assert state["message"].startswith(f"converted {COUNT}, ")  # though nobody reads its log any more


@pytest.mark.parametrize("everything", [False, True], ids=["the worker alone", "its whole control group"])
def test_a_worker_that_is_told_to_end_lets_its_runs_end_well(
    stack: PrefectStack, places: dict[str, str], everything: bool
) -> None:
    worker = stack.start_worker("told")
    run = stack.run("convert/convert-nightly", **places, workers=2)
    wait_for(lambda: finished(places) > 3, 180, "some outputs")
    started = stack.running_in(worker)
    for pid in [worker.pid, *(started if everything else [])]:  # systemd: KillMode=control-group
        with contextlib.suppress(ProcessLookupError):  # some are gone within a second
            os.kill(pid, signal.SIGTERM)
    worker.wait(120)
    state = stack.wait_for_end(run)
    assert state["type"] == "CRASHED"
    wait_for(lambda: not any(map(is_alive, started)), 30, "the end of its processes")
    (record,) = (Path(places["dest"]) / "_ptbin" / "runs").glob("*/run.json")
    told = json.loads(record.read_text())
    assert told["interrupted"]
    assert told["not_tried"] > 0
    assert not list((Path(places["dest"]) / "_ptbin" / "leases").iterdir())
    # Nothing is half written. An output whose manifest was not reached waits, claimed, for the next run.
    dest = Path(places["dest"])
    unfinished = [
        dest / f"{i:02}.bin" for i in range(COUNT) if not (dest / f"{i:02}.bin.manifest.json").exists()
    ]
    claims = {Path(claim_place(place_of(output)).path) for output in unfinished}
    assert set(dest.rglob("*.ptbin-partial")) <= claims


def test_a_worker_s_container_ends_after_its_runs_have(stack: PrefectStack, places: dict[str, str]) -> None:
    compose = yaml.safe_load((ROOT / "deployments" / "compose.yaml").read_text())
    python, *words = compose["services"]["worker"]["command"]
    assert python == "python"
    words.remove("--with-healthcheck")  # a port that may be taken here
    first = stack.start_process("first", [sys.executable, *words])
    run = stack.run("convert/convert-nightly", **places, workers=2)
    wait_for(lambda: finished(places) > 3, 180, "some outputs")
    started = stack.running_in(first)
    first.terminate()
    first.wait(120)
    assert not any(map(is_alive, started))
    assert stack.state(run)["type"] == "CRASHED"
    (record,) = (Path(places["dest"]) / "_ptbin" / "runs").glob("*/run.json")
    assert json.loads(record.read_text())["interrupted"]


@pytest.mark.slow
def test_a_drained_worker_has_finished_its_run(stack: PrefectStack, places: dict[str, str]) -> None:
    try:
        old = stack.start_worker("old")
        run = stack.run("convert/convert-nightly", **places)
        wait_for(lambda: finished(places) > 0, 180, "an output")
        drain = [sys.executable, str(ROOT / "deployments" / "drain.py"), "ptbin-process", "--timeout", "2m"]
        draining = stack.start_process("drain", drain)
        wait_for(lambda: stack.ask("/work_pools/ptbin-process", method="GET")["is_paused"], 60, "the pause")
        held_back = stack.run("verify/verify-weekly", dest=places["dest"])
        assert draining.wait(120) == 0
        assert stack.state(run)["type"] == "COMPLETED"
        assert stack.state(held_back)["type"] == "SCHEDULED"
        old.terminate()
        old.wait(60)
    finally:
        stack.prefect("work-pool", "resume", "ptbin-process")
    new = stack.start_worker("new")
    assert stack.wait_for_end(held_back)["type"] == "COMPLETED"
    stack.kill(new)


def test_parameters_of_the_wrong_kind_are_refused_before_anything_runs(
    stack: PrefectStack, places: dict[str, str]
) -> None:
    with pytest.raises(OSError, match="409"):
        stack.run("convert/convert-nightly", **places, workers="many")


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """Two processes on each core that do nothing but take its time: what is waited for comes late."""
    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 2))
    ]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, True], ids=["the worker alone", "its whole control group"])
def test_a_worker_on_a_busy_machine_lets_its_runs_end_well(
    stack: PrefectStack, places: dict[str, str], busy_cores: None, everything: bool
) -> None:
    worker = stack.start_worker("busy")
    run = stack.run("convert/convert-nightly", **places, workers=2)
    wait_for(lambda: finished(places) > 3, 400, "some outputs")
    started = stack.running_in(worker)
    for pid in [worker.pid, *(started if everything else [])]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    worker.wait(300)
    assert stack.wait_for_end(run, 300)["type"] == "CRASHED"
    wait_for(lambda: not any(map(is_alive, started)), 120, "the end of its processes")
    (record,) = (Path(places["dest"]) / "_ptbin" / "runs").glob("*/run.json")
    told = json.loads(record.read_text())
    assert told["interrupted"]
    assert told["converted"] == finished(places)
    assert not list((Path(places["dest"]) / "_ptbin" / "leases").iterdir())
