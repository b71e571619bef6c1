"""A restore that is killed, or finds the disk full: nothing looks finished that is not, a rerun mends it.

What is killed, or finds no room, is a real process with real children; restores before and after it have warm
ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin import RestoreOptions
from ptbin.errors import StorageError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("warm_children")]

ROOT = Path(ptbin.__file__).parents[1]
NETS = "from torch import nn\ndef net(): return nn.Linear(200, 200)\n"

# Python starts once; each restore runs in a fork of it, which is what gets killed.
STEPS = """
import json, os, signal, sys
import numpy
import ptbin, ptbin.conversion, ptbin.proof.output, ptbin.restoring.restore, ptbin.stores.local

SYSTEM_CALLS = ("open", "mkdir", "write", "copy_file_range", "fsync", "link", "replace", "unlink")

def arm(fatal):
    steps = 0
    def counted(name, call):
        def counting(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == fatal:
                if name == "write":
                    call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return counting
    for name in SYSTEM_CALLS:
        setattr(os, name, counted(name, getattr(os, name)))

for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            arm(task["fatal"])
            ptbin.restore(task["source"], task["dest"], run_id="run")
            status = 0
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def weights(tmp_path: Path) -> tuple[str, str]:
    """Two states of the weights of `net`, of one size."""
    found = []
    for number in (1, 2):
        torch.manual_seed(number)
        net = torch.nn.Linear(200, 200)
        torch.save(net.state_dict(), tmp_path / f"{number}.pt")
        ptbin.convert(str(tmp_path / f"{number}.pt"), str(tmp_path / f"{number}.bin"))
        found.append(str(tmp_path / f"{number}.bin"))
    (tmp_path / "killed_nets.py").write_text(NETS)
    return found[0], found[1]


def _check(out: Path, allowed: list[bytes | None]) -> None:
    """Whatever is there is whole, and a manifest vouches only for what is there."""
    assert (out.read_bytes() if out.exists() else None) in allowed
    if Path(f"{out}.manifest.json").exists():
        assert ptbin.verify(f"{out}.manifest.json") == []


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_at_every_step_of_a_state_dict(
    replacing: bool, weights: tuple[str, str], tmp_path: Path
) -> None:
    ptbin.restore(weights[0], str(tmp_path / "whole.pt"))
    ptbin.restore(weights[1], str(tmp_path / "older.pt"))
    whole, older = ((tmp_path / f"{name}.pt").read_bytes() for name in ("whole", "older"))
    out = tmp_path / "out" / "whole.pt"  # an archive's root is called after the file
    older = older.replace(b"older", b"whole")
    with subprocess.Popen(
        [sys.executable, "-c", STEPS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as runner:
        assert runner.stdin is not None
        assert runner.stdout is not None
        for fatal in range(1, 300):
            for path in out.parent.glob("*whole*"):
                path.unlink()
            if replacing:
                ptbin.restore(weights[1], str(out))
                assert out.read_bytes() == older
            task = {"source": weights[0], "dest": str(out), "fatal": fatal}
            runner.stdin.write(json.dumps(task) + "\n")
            runner.stdin.flush()
            status = int(runner.stdout.readline())
            assert status in (0, -signal.SIGKILL)
            _check(out, [whole, older if replacing else None])
            if status == 0:
                break
            ptbin.restore(weights[0], str(out))  # without force
            assert out.read_bytes() == whole
            assert ptbin.verify(f"{out}.manifest.json") == []
        assert status == 0
        assert fatal > 20
        runner.stdin.close()


AT_A_POINT = """
import os, signal, sys
import ptbin, ptbin.restoring.restore
from ptbin import RestoreOptions
from ptbin.manifests.vouching import OutputSite
from ptbin.stores.local_writer import LocalWriter

point, source, dest, folder = sys.argv[1:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def patch(kind, name, before):
    call = getattr(kind, name)
    def killing(*arguments, **options):
        if before:
            die()
        result = call(*arguments, **options)
        die()
    setattr(kind, name, killing)
if point == "aside":
    patch(OutputSite, "withdraw_manifest", False)
elif point == "stored":
    patch(OutputSite, "write_manifest", True)
else:
    import ptbin.restoring.models
    patch(ptbin.restoring.models, "_check", True)
ptbin.restore(source, dest, RestoreOptions(model="killed_nets:net", model_path=folder))
"""


@pytest.mark.parametrize(
    ("point", "replacing"), [("built", False), ("aside", True), ("stored", False), ("stored", True)]
)
def test_a_module_that_was_killed_is_restored_by_a_rerun(
    point: str, replacing: bool, weights: tuple[str, str], tmp_path: Path
) -> None:
    options = RestoreOptions(model="killed_nets:net", model_path=str(tmp_path))
    out = tmp_path / "out" / "net.pt"
    if replacing:
        ptbin.restore(weights[1], str(out), options)
    before = out.read_bytes() if replacing else None
    words = [sys.executable, "-P", "-c", AT_A_POINT, point, weights[0], str(out), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if point == "stored":
        assert out.exists()
        assert not Path(f"{out}.manifest.json").exists()
    else:
        assert (out.read_bytes() if out.exists() else None) == before
    ptbin.restore(weights[0], str(out), options)
    assert ptbin.verify(f"{out}.manifest.json") == []
    wanted = torch.load(tmp_path / "1.pt", weights_only=True)
    found = torch.load(out, weights_only=False).state_dict()  # of torch's own class
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert sorted(path.name for path in out.parent.iterdir()) == ["net.pt", "net.pt.manifest.json"]


FULL = """
import resource, sys
import ptbin
from ptbin import RestoreOptions
from ptbin.errors import StorageError

source, dest, folder, model = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a disk that takes no more
try:
    ptbin.restore(source, dest, RestoreOptions(model=model or None, model_path=folder if model else None))
except StorageError as error:
    print(error)
    sys.exit(5)
"""


@pytest.mark.parametrize("model", ["", "killed_nets:net"], ids=["state-dict", "module"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_full_disk_is_a_fault_of_the_store_and_leaves_what_was(
    model: str, replacing: bool, weights: tuple[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out" / "net.pt"
    options: dict[str, Any] = {"model": model, "model_path": str(tmp_path)} if model else {}
    if replacing:
        ptbin.restore(weights[1], str(out), RestoreOptions(**options))
    before = out.read_bytes() if replacing else None
    words = [sys.executable, "-P", "-c", FULL, weights[0], str(out), str(tmp_path), model]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 5, done.stderr
    assert (out.read_bytes() if out.exists() else None) == before
    if replacing:
        assert ptbin.verify(f"{out}.manifest.json") == []
    else:
        assert not out.parent.exists()


def test_a_full_disk_has_its_own_exit_status(weights: tuple[str, str], tmp_path: Path) -> None:
    """A fault of the store and not of the call: 1, not 2."""
    assert issubclass(StorageError, OSError)
    script = textwrap.dedent(
        """
        import resource, sys
        from flows.cli.app import run
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sys.exit(run(sys.argv[1:]))
        """
    )
    words = ["restore", weights[0], str(tmp_path / "net.pt"), "--model", "killed_nets:net"]
    words += ["--model-path", str(tmp_path), "--json"]
    done = subprocess.run([sys.executable, "-P", "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"][0]["reason"] == "storage_error"
