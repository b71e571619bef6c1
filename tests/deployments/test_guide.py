"""The guide is what it says: the blocks of deployments/README.md, in their order, on a machine with nothing.

Not run are the one that makes an environment (the suite's is on PATH) and those that name one's own places,
for which the test has some. Between them a night is added in which a file fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deployments.mailbox import Mailbox
from tests.servers.prefect_stack import ROOT, free_port, wait_for
from tests.warm_python import warm_path

pytestmark = [pytest.mark.starts_servers, pytest.mark.timeout(900)]

BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLS = "python3 -m venv"
OWN = ("export PTBIN_SOURCE=", "export HOOK=")
SYSTEMD = ROOT / "deployments" / "systemd"


def guide_blocks() -> list[str]:
    text = (ROOT / "deployments" / "README.md").read_text()
    section = text[text.index("## One machine") : text.index("## Credentials")]
    return [block for block in BLOCK.findall(section) if not block.startswith(INSTALLS)]


def note_failure(mailbox: Mailbox, heard: Path) -> None:
    wait_for(lambda: any(letter["state"] == "Failed" for letter in mailbox.at("/hook")), 600)
    heard.touch()


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    mailbox = Mailbox()
    yield mailbox
    mailbox.close()


def test_the_guide_s_blocks_lead_from_nothing_to_an_alert_a_retry_and_metrics(
    tmp_path: Path, mailbox: Mailbox
) -> None:
    source, dest, machine = tmp_path / "runs", tmp_path / "weights", tmp_path / "machine"
    source.mkdir()
    machine.mkdir()
    for name in ("a", "b"):
        torch.save({"state_dict": {"w": torch.arange(3.0)}}, source / f"{name}.pt")
    whole = (source / "a.pt").read_bytes()
    (source / "cut.pt").write_bytes(whole[:-30])
    # The night with a failure comes before the morning, and the file is mended before it is tried again.
    heard = tmp_path / "heard"
    threading.Thread(target=note_failure, args=(mailbox, heard), daemon=True).start()
    # On SQLite, Prefect's server drops an event that three tries in a row found the database locked for: then
    # nobody is told of that night.
    night = (
        "for _ in 1 2 3 4 5; do\n"
        "prefect deployment run convert/convert-nightly --watch || true\n"
        f"for _ in $(seq 100); do [ -e {heard} ] && break 2; sleep 0.2; done\n"
        "done\n"
    )
    mended = f"cp {source}/a.pt {source}/cut.pt\n"
    script = ["set -eu", "trap 'kill $(jobs -p) 2> /dev/null; wait || true' EXIT"]
    for block in guide_blocks():
        if block.startswith(OWN):
            continue
        if block.startswith("python -P -m flows.worker_process"):
            block = block.replace("--watch", "--watch || true")  # its checkpoint that is cut fails it
        if block.startswith("ptbin status"):
            script.append(night)
            block = block.replace("prefect deployment run", mended + "prefect deployment run")
        script.append(block)
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "PTBIN", "PYTHON"))
    }
    workdir = tmp_path / "not" / "there" / "yet"
    environment = kept | {
        "PATH": f"{warm_path()}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(machine),
        "PORT": str(free_port()),
        "PTBIN_SOURCE": str(source),
        "PTBIN_DEST": str(dest),
        "PTBIN_WORKDIR": str(workdir),
        "HOOK": f"http://{mailbox.address}/hook",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(script)],
        cwd=machine,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=800)
    finally:
        end_group(process)
    logs = "\n".join(file.read_text() for file in machine.glob("*.log"))
    assert process.returncode == 0, out + logs
    assert sorted(path.name for path in dest.glob("*.bin")) == ["a.bin", "b.bin", "cut.bin"]
    loaded = torch.load(dest / "cut.bin", weights_only=True)
    assert torch.equal(loaded["w"], torch.arange(3.0))
    records = sorted((dest / "_ptbin" / "runs").glob("*/run.json"))
    runs: list[dict[str, Any]] = [json.loads(record.read_text()) for record in records]
    first, *nights, morning = [(run["converted"], run["rejected"], run["resolved"]) for run in runs]
    assert (first, set(nights), morning) == ((2, 1, 0), {(0, 1, 0)}, (1, 0, 1))
    assert "cut.pt" in out  # status
    told = [letter for letter in mailbox.at("/hook") if letter["state"] == "Failed"]
    assert told
    assert "cut.pt: corrupt_archive" in told[0]["failures"][0]
    assert told[0]["url"].startswith(f"http://127.0.0.1:{environment['PORT']}/")
    metrics = (workdir / "ptbin.prom").read_text()
    assert re.search(r"ptbin_last_run_success\{.*\} 1$", metrics, re.MULTILINE)


def end_group(process: subprocess.Popen[str]) -> None:
    """What the script has left behind, and everything that that started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        time.sleep(2)


def test_every_deployment_that_the_guide_names_is_deployed_by_it() -> None:
    text = (ROOT / "deployments" / "README.md").read_text()
    section = text[text.index("## One machine") : text.index("## Credentials")]
    named = set(re.findall(r"`([a-z]+-(?:nightly|weekly))`", section))
    assert named <= set(re.findall(r"--name (\S+)", section))


@pytest.mark.parametrize("unit", sorted(SYSTEMD.glob("ptbin-*")), ids=lambda path: path.name)
def test_units_are_what_systemd_takes(unit: Path, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd here")
    # The programs of a real installation are not there.
    for file in SYSTEMD.glob("ptbin-*"):
        text = re.sub(r"/opt/ptbin/bin/\w+", "/bin/true", file.read_text())
        (tmp_path / file.name).write_text(text)
    done = subprocess.run(
        [program, "verify", "--man=no", "--recursive-errors=no", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
    )
    complaints = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "Unknown" in line]
    assert complaints == []
    assert done.returncode == 0, done.stderr


def test_the_units_environment_names_what_they_use() -> None:
    given = dict(
        line.split("=", 1)
        for line in (SYSTEMD / "environment").read_text().splitlines()
        if line[:1].isalpha()
    )
    for unit in SYSTEMD.glob("*.service"):
        assert set(re.findall(r"\$\{(\w+)\}", unit.read_text())) <= given.keys()
    assert given["PREFECT_API_URL"].split(":")[2].split("/")[0] == given["PREFECT_SERVER_API_PORT"]


def test_a_working_directory_is_made_and_one_that_cannot_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.prefect.working_directory import enter_working_directory
    from ptbin.errors import UsageError

    monkeypatch.chdir(tmp_path)
    assert enter_working_directory(str(tmp_path / "a" / "b")) == {"directory": str(tmp_path / "a" / "b")}
    assert Path.cwd() == tmp_path / "a" / "b"
    monkeypatch.delenv("PTBIN_WORKDIR", raising=False)
    assert enter_working_directory("{{ $PTBIN_WORKDIR }}") == {"directory": str(tmp_path / "a" / "b")}
    monkeypatch.setenv("PTBIN_WORKDIR", str(tmp_path / "c"))
    assert enter_working_directory("") == {"directory": str(tmp_path / "c")}
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be used by the worker's user"):
        enter_working_directory(str(tmp_path / "file" / "x"))
