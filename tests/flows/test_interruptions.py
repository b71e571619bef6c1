"""Runs interrupted at random moments, again and again; then one that is left alone.

Afterwards the destination must be what an undisturbed run makes: the same bytes, no temporary files, no
multipart uploads that somebody pays for.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.prefect.orchestrator import Orchestrator
from ptbin.stores import open_store
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import rados_s3
from tests.warm_python import stand_in

__all__ = ["rados_s3"]

COMMAND = "from flows.cli import main\nif __name__ == '__main__':\n    main()\n"
BIG = 20 << 20
VOLATILE = {"run_id", "started_at", "finished_at", "verification", "bytes_read", "notes", "source"}


@dataclass
class Bench:
    """A store of checkpoints, a destination, and the command line between them."""

    source: Path
    dest: str
    options: dict[str, Any]
    api_url: str
    folder: Path

    def start(
        self, dest: str | None = None, runner: str = "threads", python: str = sys.executable
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [python, "-c", COMMAND, "convert", str(self.source), dest or self.dest, "--json",
             "--dest-options", json.dumps({} if dest else self.options), "--runner", runner],
            cwd=self.folder,
            env=os.environ | {"PREFECT_API_URL": self.api_url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def finish(self, dest: str | None = None) -> dict[str, Any]:
        process = self.start(dest, python=stand_in())
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def stored(self, dest: str | None = None) -> dict[str, Any]:
        """Outputs by their bytes, manifests by what does not depend on the day."""
        place = dest or self.dest
        store, path = open_store(place, {} if dest else self.options)
        found: dict[str, Any] = {}
        for item in store.iter_objects(path):
            if item.path.startswith("_ptbin/"):
                continue
            data = store.read_bytes(f"{path}/{item.path}", limit=1 << 30)
            if item.path.endswith(".json"):
                found[item.path] = {k: v for k, v in json.loads(data).items() if k not in VOLATILE}
            else:
                found[item.path] = data
        return found

    def touch_some(self, dice: random.Random) -> None:
        """Some checkpoints are written anew, with the content they had."""
        for path in dice.sample(sorted(self.source.iterdir()), 8):
            path.write_bytes(path.read_bytes())


@pytest.fixture(params=["files", pytest.param("s3", marks=pytest.mark.s3_real)])
def bench(request: pytest.FixtureRequest, server: Orchestrator, tmp_path: Path) -> Iterator[Bench]:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(30):
        count = BIG // 4 if number < 3 else 5000
        torch.save(
            {"state_dict": {"w": torch.full((count,), float(number))}, "epoch": 1}, source / f"{number:02}.pt"
        )
    if request.param == "files":
        yield Bench(source, str(tmp_path / "out"), {}, server.api_url, tmp_path)
        return
    endpoint: S3Endpoint = request.getfixturevalue("rados_s3")
    bucket = endpoint.make_bucket()
    yield Bench(source, f"s3://{bucket}/out", endpoint.storage_options, server.api_url, tmp_path)
    assert endpoint.uploads_in(bucket) == []
    endpoint.empty(bucket)


def interrupt_many(bench: Bench, times: int, seed: int) -> None:
    dice = random.Random(seed)
    told = f"seed {seed}"
    for round_ in range(times):
        bench.touch_some(dice)
        process = bench.start(runner=dice.choice(["threads", "threads", "processes"]))
        number = dice.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
        # Most of the first two seconds is Python and Prefect beginning.
        time.sleep(dice.choice([dice.uniform(0, 1.5), dice.uniform(1.5, 4.0)]))
        process.send_signal(number)
        _, err = process.communicate(timeout=250)
        if err.startswith("Fatal Python error: init_"):
            continue  # Python itself was interrupted as it began, and says so with status 1
        # 0: it was through by then; -15 and -2: before it could handle signals.
        allowed = {0, 130, -int(number)}
        assert process.returncode in allowed, f"{told}, round {round_}, {number}: {process.returncode} {err}"
        # Python itself tells of an interrupt that comes before its handler is there.
        assert process.returncode < 0 or "Traceback" not in err, f"{told}, round {round_}: {err}"


def assert_as_if_undisturbed(bench: Bench) -> None:
    bench.finish()
    again = bench.finish()
    assert (again["converted"], again["up_to_date"]) == (0, 30)
    calm = str(bench.folder / "calm")
    bench.finish(calm)
    assert bench.stored() == bench.stored(calm)
    if not bench.options:
        names = [path.name for path in Path(bench.dest).rglob("*")]
        assert not [name for name in names if name.endswith(".ptbin-partial")]
        assert not list((Path(bench.dest) / "_ptbin" / "leases").iterdir())


def test_a_few_interruptions_leave_no_trace(bench: Bench) -> None:
    interrupt_many(bench, 4, random.randrange(1 << 30))
    assert_as_if_undisturbed(bench)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifty_interruptions_leave_no_trace(bench: Bench) -> None:
    interrupt_many(bench, 50, random.randrange(1 << 30))
    assert_as_if_undisturbed(bench)
