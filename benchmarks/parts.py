"""Merging rank files: ptbin against `cat` and `sha256sum` of as many bytes, and against ten lines of torch.

    python -m benchmarks.parts FOLDER [--ranks 8] [--mib 128] [--rounds 3]

Makes the files of all ranks of an FSDP2 run below FOLDER, then times in turn, the page cache warm: `cat` of
all files into one and `sha256sum` of that; `ptbin convert` of the folder, proven and with its manifest; a
script that loads every rank's file, concatenates and saves. Prints medians in seconds and each child's peak
memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PEER = """
import sys, torch
files = sorted(sys.argv[2:])
parts = [torch.load(file, weights_only=False) for file in files]
whole = {}
for name, first in parts[0].items():
    dim = first.placements[0].dim
    whole[name] = torch.cat([part[name].to_local() for part in parts], dim)
torch.save(whole, sys.argv[1])
"""

MAKE = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
folder, ranks, mib = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = mib * 2**20 // 4 // 1024 // 8
for rank in range(ranks):
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    state = {}
    for layer in range(8):
        local = torch.randn(rows, 1024)
        state[f"layers.{layer}.weight"] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    torch.save(state, f"{folder}/model_world_size_{ranks}_rank_{rank}.pt")
    dist.destroy_process_group()
"""


def _run(command: list[str]) -> tuple[float, float]:
    """Seconds, and the peak memory of the process in MiB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{command[0]} failed with {status}")
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


def main() -> None:
    """Make the files and time all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--mib", type=int, default=128, help="of each rank's file")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    ranks = asked.folder / "ranks"
    ranks.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-I", "-c", MAKE, str(ranks), str(asked.ranks), str(asked.mib)], check=True
    )
    files = sorted(str(path) for path in ranks.iterdir())
    out = str(asked.folder / "whole.bin")
    ptbin = str(Path(sys.executable).with_name("ptbin"))
    commands = {
        "cat + sha256sum": ["sh", "-c", f"cat {' '.join(files)} > {out} && sha256sum {out}"],
        "ptbin convert": [ptbin, "convert", str(ranks), out, "--force", "--quiet"],
        "torch, ten lines": [sys.executable, "-I", "-c", PEER, out, *files],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(asked.rounds):
        for name, command in commands.items():
            Path(out).unlink(missing_ok=True)
            found[name].append(_run(command))
    for name, rows in found.items():
        seconds, peak = statistics.median(row[0] for row in rows), max(row[1] for row in rows)
        print(f"{name:18} {seconds:7.2f} s  {peak:7.0f} MiB")


if __name__ == "__main__":
    main()
