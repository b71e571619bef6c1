"""How conversion scales with the cores: one large checkpoint, and many small ones at once.

    python benchmarks/cores.py --dir /dev/shm/bench --gib 8 --report docs/benchmarks-cores.md

Whole processes, bound to the first 1, 2, 4, ... cores; peers in the same run, in turns: `cp`, `sha256sum`,
and a script that maps the checkpoint with torch, keeps the state dict and saves it, which proves nothing.
Needs Python, NumPy and torch, and no more of ptbin than the engine. `--also NAME=FOLDER` measures another
checkout's engine beside this one.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20

CONVERT = """
import sys, ptbin
ptbin.convert(sys.argv[1], sys.argv[2], ptbin.ConvertOptions(verify=sys.argv[3], force=True))
"""
MANY = """
import sys, ptbin
from concurrent.futures import ThreadPoolExecutor
folder, out, level, at_once = sys.argv[1:5]
import os
names = sorted(os.listdir(folder))
options = ptbin.ConvertOptions(verify=level, force=True)
with ThreadPoolExecutor(int(at_once)) as pool:
    list(pool.map(lambda name: ptbin.convert(f"{folder}/{name}", f"{out}/{name}.bin", options), names))
"""
TORCH = """
import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", mmap=True, weights_only=True)["model"]
torch.save(state, sys.argv[2])
"""


def make_checkpoint(path: Path, nbytes: int) -> None:
    """Weights of about `nbytes` in tensors of 64 MiB at most, and as many bytes of optimizer state."""
    import torch

    torch.manual_seed(0)
    size = min(64 * MIB, max(nbytes // 8, 4096)) // 4
    count = max(1, nbytes // (4 * size))
    model = {
        f"layers.{i}.weight": torch.randint(0, 1 << 31, (size,), dtype=torch.int32).view(torch.float32)
        for i in range(count)
    }
    moments = {i: {"exp_avg": torch.zeros(size), "step": torch.tensor(1.0)} for i in range(count)}
    torch.save(
        {"model": model, "optimizer": {"state": moments, "param_groups": [{"params": list(moments)}]}}, path
    )


def seconds_of(command: Sequence[str], cores: int, engine: Path) -> float:
    bound = ["taskset", "-c", f"0-{cores - 1}", *command] if shutil.which("taskset") else list(command)
    environment = os.environ | {"PYTHONPATH": str(engine)}
    began = time.monotonic()
    subprocess.run(bound, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("benchmarks/work"))
    parser.add_argument("--gib", type=float, default=2.0, help="weights of the large checkpoint")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cores", help="1,2,4,... (default: powers of two, and all)")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    available = len(os.sched_getaffinity(0))
    counts = [int(n) for n in options.cores.split(",")] if options.cores else _powers(available)
    engines = {"ptbin": ROOT} | {
        name: Path(folder).resolve() for name, _, folder in (a.partition("=") for a in options.also)
    }
    options.dir.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{platform.machine()}, {available} cores, {options.runs} runs each, medians in seconds (min to max)",
        "",
    ]
    try:
        lines += _large(options, counts, engines)
        lines += _many(options, counts, engines)
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)
    if options.report is not None:
        options.report.write_text("# Cores\n\n" + "\n".join(lines) + "\n")


def _powers(limit: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= limit:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == limit else [*counts, limit]


def _print(line: str) -> str:
    print(line, flush=True)
    return line


def _measured(commands: dict[str, tuple[list[str], Path]], cores: int, runs: int) -> dict[str, list[float]]:
    """Seconds of each command, in turns, after one round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, (command, engine) in commands.items():
            taken = seconds_of(command, cores, engine)
            if turn:
                found[name].append(taken)
    return found


def _large(options: argparse.Namespace, counts: list[int], engines: dict[str, Path]) -> list[str]:
    source, out = options.dir / "large.pt", options.dir / "large.bin"
    make_checkpoint(source, int(options.gib * 1024 * MIB))
    python = sys.executable
    seconds_of([python, "-c", CONVERT, str(source), str(out), "none"], max(counts), ROOT)
    commands: dict[str, tuple[list[str], Path]] = {
        "cp": (["cp", str(out), str(options.dir / "copy")], ROOT),
        "sha256sum": (["sha256sum", str(out)], ROOT),
        "torch, mapped": ([python, "-c", TORCH, str(source), str(options.dir / "torch.bin")], ROOT),
    }
    for name, engine in engines.items():
        for level in ("none", "checksum"):
            target = str(options.dir / f"{name}.bin")
            commands[f"{name} {level}"] = ([python, "-c", CONVERT, str(source), target, level], engine)
    lines = [
        _print(f"one checkpoint, {options.gib:g} GiB of weights | " + " | ".join(map(str, counts))),
        "---|" * (len(counts) + 1),
    ]
    columns = {n: _measured(commands, n, options.runs) for n in counts}
    for name in commands:
        cells = [
            f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
            for times in (columns[n][name] for n in counts)
        ]
        lines.append(_print(f"{name} | " + " | ".join(cells)))
    for file in options.dir.iterdir():
        file.unlink()
    return [*lines, ""]


def _many(options: argparse.Namespace, counts: list[int], engines: dict[str, Path]) -> list[str]:
    folder, out = options.dir / "many", options.dir / "out"
    folder.mkdir()
    out.mkdir()
    total = int(options.gib * 1024 * MIB / 2)
    for index in range(32):
        make_checkpoint(folder / f"{index:02}.pt", total // 32)
    lines = [
        _print(
            f"32 checkpoints, {total / 1024 / MIB:g} GiB of weights, at once | "
            + " | ".join(map(str, counts))
        ),
        "---|" * (len(counts) + 1),
    ]
    python = sys.executable
    rates: dict[str, list[str]] = {}
    for at_once in counts:
        commands: dict[str, tuple[list[str], Path]] = {}
        for name, engine in engines.items():
            for level in ("none", "checksum"):
                commands[f"{name} {level}, MB/s"] = (
                    [python, "-c", MANY, str(folder), str(out), level, str(at_once)],
                    engine,
                )
        shell = (
            f"ls {out}/*.bin | xargs -P {at_once} -I F sh -c 'cp F F.copy && sha256sum F.copy && rm F.copy'"
        )
        commands["cp + sha256sum, MB/s"] = (["sh", "-c", shell], ROOT)
        for name, taken in _measured(commands, max(counts), options.runs).items():
            rates.setdefault(name, []).append(f"{total / 1e6 / statistics.median(taken):,.0f}")
    lines += [_print(f"{name} | " + " | ".join(cells)) for name, cells in rates.items()]
    return lines


if __name__ == "__main__":
    main()
