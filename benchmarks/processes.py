"""Whole processes, timed and weighed from outside. Knows nothing of checkpoints.

`wait4` gives the resident peak of the process that was waited for. Linux lets a child begin with its
parent's peak (fs/exec.c, `exec_mmap`: `setmax_mm_hiwater_rss`), so each command is started by a bare
interpreter of 9 MiB; that is the smallest peak which can be told. Commands that are compared are run in
turns, round by round: what the machine does meanwhile hits all of them, and medians are taken over rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Command", "Measured", "measure_in_turns", "run_once", "warm"]


@dataclass(frozen=True)
class Command:
    """A command line, and the file that it writes, removed before each run.

    `before` clears away what `output` cannot name, and `after` looks at what was made; neither is measured.
    A `status` of None takes any: then `after` is the judge.
    """

    argv: Sequence[str]
    output: Path | None = None
    status: int | None = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None


@dataclass(frozen=True)
class Measured:
    """All runs of one command."""

    seconds: tuple[float, ...]
    peak_nbytes: tuple[int, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak(self) -> int:
        return max(self.peak_nbytes)


# Times and weighs one command, whose output goes to this process's standard output; its own standard error
# is the answer. ru_maxrss is in KiB (getrusage(2)).
_STARTER = """
import os, sys, time
started = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 1, 2)])
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - started
sys.stderr.write(f"[{seconds}, {usage.ru_maxrss * 1024}, {os.waitstatus_to_exitcode(status)}]")
"""


def run_once(command: Command, log: Path) -> tuple[float, int]:
    """Seconds and peak bytes of one run; what it says goes to `log`.

    Raises:
        RuntimeError: it ended with another exit status than it should.
    """
    if command.output is not None:
        for leftover in (command.output, command.output.with_name(command.output.name + ".manifest.json")):
            leftover.unlink(missing_ok=True)
    if command.before is not None:
        command.before()
    # Pages that an earlier run left dirty would be written back at this one's cost.
    os.sync()
    with log.open("wb") as sink:
        starter = [sys.executable, "-I", "-S", "-c", _STARTER, *command.argv]
        done = subprocess.run(
            starter,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.PIPE,
            check=True,
            env={**os.environ, **command.environment},
        )
    seconds, peak_nbytes, status = json.loads(done.stderr)
    if command.status is not None and status != command.status:
        said = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command.argv)[:300]}: exit {status}\n{said}")
    if command.after is not None:
        command.after()
    return float(seconds), int(peak_nbytes)


def measure_in_turns(
    commands: Mapping[str, Command],
    *,
    rounds: int,
    log: Path,
    say: Callable[[str], None],
    warm_up: bool = True,
) -> dict[str, Measured]:
    """Run every command once, unmeasured (unless the caller has), then `rounds` times in turns.

    Raises:
        RuntimeError: a command ended with another exit status than it should.
    """
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for command in commands.values() if warm_up else ():
        run_once(command, log)
    for number in range(rounds):
        for name, command in commands.items():
            runs[name].append(run_once(command, log))
        say(
            f"round {number + 1} of {rounds}: "
            + ", ".join(f"{name} {runs[name][-1][0]:.2f} s" for name in commands)
        )
    return {
        name: Measured(tuple(seconds for seconds, _ in done), tuple(peak for _, peak in done))
        for name, done in runs.items()
    }


def warm(path: Path) -> None:
    """Read a file once, so that it lies in the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
