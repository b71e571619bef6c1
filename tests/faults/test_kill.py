"""SIGKILL at every step of a conversion: what is left never looks finished, and a rerun mends it.

A step is a call that touches the outside: every system call that writes, names, flushes or removes
(and some reads), or every request to an S3 store. The n-th one kills the process, for each n until a
run gets through; of a write half the bytes still go out.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin import catalog
from ptbin.stores import open_store
from tests.checkpoints.dtypes import random_bits
from tests.servers.endpoint import S3Endpoint

pytestmark = pytest.mark.starts_processes

ROOT = Path(ptbin.__file__).parents[1]

# Python starts once; each conversion runs in a fork of it, which is what gets killed.
_RUNNER = """
import json, os, signal, sys
import numpy, s3fs
import ptbin, ptbin.conversion, ptbin.proof.output, ptbin.stores.local, ptbin.stores.s3

SYSTEM_CALLS = ("open", "mkdir", "write", "copy_file_range", "fsync", "link", "replace", "unlink", "pread")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def arm(fatal, what, options):
    steps = 0

    def step(name, call, arguments):
        nonlocal steps
        steps += 1
        if steps == fatal:
            if name == "write":
                descriptor, data = arguments
                call(descriptor, bytes(data)[: len(data) // 2])
            die()
    def counted(name, call):
        def counting(*arguments, **options):
            step(name, call, arguments)
            return call(*arguments, **options)
        return counting
    if what == "requests":
        # By botocore's event, on the client that the filesystem of these options has.
        events = ptbin.stores.s3.S3Store(options).client.fs.s3.meta.events
        events.register("provide-client-params.s3", lambda **_: step("request", None, ()))
    else:
        for name in SYSTEM_CALLS:
            setattr(os, name, counted(name, getattr(os, name)))
    if what == "named":
        del os.O_TMPFILE

for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            options = task["options"]
            arm(task["fatal"], task["what"], options)
            ptbin.convert(task["source"], task["dest"], dest_options=options, run_id="run")
            status = 0
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Runner:
    """Conversions in processes of their own."""

    process: subprocess.Popen[str]

    def survives(self, source: Path, dest: str, fatal: int, what: str, options: Mapping[str, Any]) -> bool:
        """Convert with a SIGKILL at step `fatal`; whether it came to its end before that."""
        task = {"source": str(source), "dest": dest, "fatal": fatal, "what": what, "options": options}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        assert status in (0, -signal.SIGKILL), "failed before it was killed"
        return status == 0


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", _RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield Runner(process)
        assert process.stdin is not None
        process.stdin.close()


def _save(path: Path, seed: int) -> None:
    """A training dict of 5 MB: runs of neighbours, holes between them, a view that must be gathered."""
    weights = {
        "first": random_bits(torch.float32, (600, 500), seed=seed),
        "second": random_bits(torch.float32, (100,), seed=seed + 1),
        "transposed": random_bits(torch.float32, (400, 300), seed=seed + 2).t(),
        "third": random_bits(torch.bfloat16, (300, 300), seed=seed + 3),
    }
    momentum = random_bits(torch.float32, (700, 1000), seed=seed + 4)
    torch.save({"optimizer": {"state": {0: {"momentum": momentum}}}, "state_dict": weights}, path)


@dataclass
class Scene:
    """One source, one destination, and what an undisturbed run makes of it."""

    source: Path
    dest: str
    undisturbed: bytes
    dest_options: Mapping[str, Any] = field(default_factory=dict)
    before: bytes | None = None
    """The output of an earlier version of the source, where there is one."""

    def read(self, uri: str) -> bytes | None:
        store, path = open_store(uri, self.dest_options)
        try:
            return store.read_bytes(path)
        except FileNotFoundError:
            return None

    def job(self) -> catalog.Job:
        (found,) = catalog.find_checkpoints(str(self.source))
        folder = self.dest.rpartition("/")[0]
        return catalog.Job(found.uri, found.size, f"{folder}/model.bin", found.path, True, found.identity)

    def listed(self) -> list[str]:
        """What a run over the destination would take for checkpoints, even one that asks for everything."""
        folder = self.dest.rpartition("/")[0]
        try:
            found = list(catalog.find_checkpoints(folder, include=["*"], storage_options=self.dest_options))
        except FileNotFoundError:
            return []
        return [one.path for one in found]

    def is_up_to_date(self) -> bool:
        return catalog.is_up_to_date(self.job(), ptbin.ConvertOptions(), dest_options=self.dest_options)

    def check(self) -> None:
        """What a reader and a rerun see is true, whatever it is."""
        output, manifest = self.read(self.dest), self.read(f"{self.dest}.manifest.json")
        assert output in (None, self.before, self.undisturbed)
        assert self.listed() == (["model.bin"] if output is not None else [])
        if manifest is not None:
            manifest_uri = f"{self.dest}.manifest.json"
            assert ptbin.verify(manifest_uri, storage_options=self.dest_options) == []
        now = json.loads(manifest) if manifest is not None else None
        identity = self.job().identity
        assert identity is not None
        speaks_of_this_source = now is not None and now["source"]["identity"] == identity.to_json()
        assert self.is_up_to_date() == speaks_of_this_source
        if speaks_of_this_source:
            assert output == self.undisturbed
        elif now is not None:
            assert output == self.before

    def rerun(self) -> None:
        ptbin.convert(str(self.source), self.dest, dest_options=self.dest_options)
        assert self.read(self.dest) == self.undisturbed
        assert self.is_up_to_date()
        assert ptbin.verify(f"{self.dest}.manifest.json", storage_options=self.dest_options) == []


def _kill_at_every_step(scene: Scene, runner: Runner, earlier: Path | None, what: str) -> int:
    """Steps that an undisturbed run takes."""
    store, path = open_store(scene.dest, scene.dest_options)
    for fatal in range(1, 400):
        store.delete(path)
        store.delete(f"{path}.manifest.json")
        if earlier is not None:
            ptbin.convert(str(earlier), scene.dest, dest_options=scene.dest_options)
            # The manifest must speak of another state of this very source, as after an overwrite.
            store.write_bytes(
                f"{path}.manifest.json",
                store.read_bytes(f"{path}.manifest.json").replace(
                    str(earlier).encode(), str(scene.source).encode()
                ),
            )
        survived = runner.survives(scene.source, scene.dest, fatal, what, scene.dest_options)
        try:
            scene.check()
            if survived:
                assert scene.is_up_to_date()
                return fatal - 1
            scene.rerun()
        except BaseException as error:
            error.add_note(f"killed at step {fatal}")
            raise
    pytest.fail("no run came to its end")


def _scene(tmp_path: Path, folder: str, options: Mapping[str, Any] | None = None) -> Scene:
    source = tmp_path / "model.pt"
    _save(source, 1)
    reference = tmp_path / "reference.bin"
    ptbin.convert(str(source), str(reference))
    return Scene(source, f"{folder}/model.bin", reference.read_bytes(), options or {})


def _earlier(scene: Scene, tmp_path: Path) -> Path:
    """Another version of the source: other weights, the very same sizes."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    earlier = folder / "model.pt"
    _save(earlier, 50)
    ptbin.convert(str(earlier), str(folder / "model.bin"))
    scene.before = (folder / "model.bin").read_bytes()
    assert len(scene.before) == len(scene.undisturbed)
    assert scene.before != scene.undisturbed
    return earlier


@pytest.mark.parametrize("what", ["unnamed", "named"])
def test_killed_at_every_step_of_a_first_conversion(tmp_path: Path, runner: Runner, what: str) -> None:
    """`named`: a filesystem without unnamed files, where a killed process leaves a temporary one behind."""
    scene = _scene(tmp_path, str(tmp_path / "deep" / "out"))
    steps = _kill_at_every_step(scene, runner, None, what)
    assert steps > 20
    left = [path.name for path in (tmp_path / "deep" / "out").iterdir()]
    if what == "named":
        assert sum(name.endswith(".ptbin-partial") for name in left) > 5
    else:
        assert sorted(left) == ["model.bin", "model.bin.manifest.json"]


@pytest.mark.parametrize("what", ["unnamed", "named"])
def test_killed_at_every_step_of_replacing_an_older_output(tmp_path: Path, runner: Runner, what: str) -> None:
    scene = _scene(tmp_path, str(tmp_path / "out"))
    steps = _kill_at_every_step(scene, runner, _earlier(scene, tmp_path), what)
    assert steps > 30


@pytest.mark.parametrize("older", [False, True], ids=["first", "replacing"])
def test_killed_at_every_request_to_s3(
    tmp_path: Path, runner: Runner, moto_s3: S3Endpoint, older: bool
) -> None:
    scene = _scene(tmp_path, f"s3://{moto_s3.make_bucket()}/out", moto_s3.storage_options)
    steps = _kill_at_every_step(scene, runner, _earlier(scene, tmp_path) if older else None, "requests")
    assert steps > 4


_CONVERT = "import sys, ptbin; print('begun', flush=True); ptbin.convert(sys.argv[1], sys.argv[2])"


def test_killed_from_outside_at_any_moment(tmp_path: Path) -> None:
    """No step is spared: the moments are spread over a whole run, and beyond."""
    scene = _scene(tmp_path, str(tmp_path / "out"))
    command = [sys.executable, "-c", _CONVERT, str(scene.source), scene.dest]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(seconds: float) -> int:
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(seconds)
            process.kill()
            return process.wait()

    begun = time.monotonic()
    assert run(60) == 0
    whole = time.monotonic() - begun
    statuses = []
    for moment in range(16):
        for name in ("model.bin", "model.bin.manifest.json"):
            (tmp_path / "out" / name).unlink(missing_ok=True)
        statuses.append(run(whole * moment / 16))
        scene.check()
    assert set(statuses) <= {0, -signal.SIGKILL}
    assert -signal.SIGKILL in statuses
    scene.rerun()
