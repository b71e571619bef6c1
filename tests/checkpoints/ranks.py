"""Ranks of a process group, forked from one process that has imported what they need.

    run_ranks(Path(__file__), [(2, [str(folder)])], imports=["deepspeed"])

Importing torch takes a process two seconds, DeepSpeed five: so it is done once and not once a rank. The
program is a file with a function `run_rank(rank, world, *words)`; `RANK`, `WORLD_SIZE` and their like are set
as launchers set them. Where a rank fails, the others, which would wait for it, are killed.

This file is also the launcher, which imports nothing of the suite:

    python -P ranks.py PROGRAM IMPORTS STARTS      # the last two in JSON
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["run_ranks"]

TIMEOUT_SECONDS = 300
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_ranks(
    program: Path,
    starts: Sequence[tuple[int, Sequence[str]]],
    *,
    imports: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run the program for each of `starts`, a number of ranks and their words, one after the other.

    Raises:
        RuntimeError: a rank failed, with the last that all have said.
    """
    launcher = subprocess.Popen(
        [sys.executable, "-P", __file__, str(program), json.dumps(list(imports)), json.dumps(list(starts))],
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = launcher.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    if launcher.returncode:
        raise RuntimeError(f"{program.name} failed with {launcher.returncode}: {said[-6000:]}")


def _launch(program: Path, imports: Sequence[str], starts: Sequence[tuple[int, Sequence[str]]]) -> None:
    for name in imports:
        importlib.import_module(name)
    sys.modules["tests.checkpoints.ranks"] = sys.modules[
        __name__
    ]  # the program imports it; `-P` hides the suite
    spec = importlib.util.spec_from_file_location(program.stem, program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[program.stem] = module  # what the ranks pickle is looked for there
    spec.loader.exec_module(module)
    for world, words in starts:
        running = {_fork(module, rank, world, words) for rank in range(world)}
        while running:
            pid, status = os.wait()
            running.discard(pid)
            if status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"a rank of {world} failed with {os.waitstatus_to_exitcode(status)}")


def _fork(module: Any, rank: int, world: int, words: Sequence[str]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        _be(module, rank, world, words)
    return pid


def _be(module: Any, rank: int, world: int, words: Sequence[str]) -> NoReturn:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
    os.environ.update({name: str(value) for name, value in own.items()})
    status = 1
    try:
        module.run_rank(rank, world, *words)
        status = 0
    except BaseException:  # noqa: BLE001 - told by the exit status, as an interpreter does
        traceback.print_exc()
    # Sometimes a thread of torch outlives what it belongs to and ends the process with "terminate called
    # without an active exception": no interpreter is taken down here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _launch(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
