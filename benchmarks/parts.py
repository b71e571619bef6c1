"""Merging rank files and planning very large ones: ptbin against `cat` and `sha256sum`, and against torch.

    python -m benchmarks.parts FOLDER [--ranks 8] [--mib 1024] [--rounds 3] [--plan-ranks 64] [--no-peers]

Makes the files of all ranks of an FSDP2 run below FOLDER, then times in turn, the page cache warm: `cat` of
all files into one and `sha256sum` of that; `ptbin convert` of the folder, proven and with its manifest;
verl's merger in ten lines of torch. Of a DCP folder of as many bytes: `dcp_to_torch_save`, `ptbin convert`.
Then plans a model of 405 billion parameters: the rank files of `--plan-ranks` ranks at their true size, as
sparse files. Prints medians in seconds, each child's peak memory, and whether the bars hold; what was made is
deleted. Needs twice the bytes of all ranks of free disk, and of memory, for the peers, as many.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

PEER = """
import logging, sys, torch
logging.disable(logging.WARNING)
files = sorted(sys.argv[2:])
parts = [torch.load(file, weights_only=False) for file in files]
whole = {}
for name, first in parts[0].items():
    dim = first.placements[0].dim
    whole[name] = torch.cat([part[name].to_local() for part in parts], dim)
torch.save(whole, sys.argv[1])
"""

DCP_PEER = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
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

MAKE_DCP = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import torch.distributed.checkpoint as dcp
folder, ranks, mib = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = ranks * mib * 2**20 // 4 // 1024 // 8
dcp.save({f"layers.{n}.weight": torch.randn(rows, 1024) for n in range(8)}, checkpoint_id=folder)
"""

PLAN = """
import sys
import ptbin
report = ptbin.inspect(sys.argv[1])
assert len(report["tensors"]) == 1137, report["detail"]
"""

SPARSE_RANKS = Path(__file__).with_name("sparse_ranks.py")
BARS = {"speed": 0.8, "plan seconds": 10.0, "MiB": 250.0}


def _run(command: list[str]) -> tuple[float, float]:
    """Seconds, and the peak memory of the process in MiB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{command[0]} failed with {status}")
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


def _python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-P", "-c", code, *map(str, arguments)]


def _bar(name: str, found: float, bar: float, *, least: bool) -> None:
    print(f"{name}: {found:.2f}, at {'least' if least else 'most'} {bar:.2f}: {(found >= bar) == least}")


def _merging(folder: Path, ranks: int, mib: int, rounds: int, *, peers: bool) -> None:
    made, out = folder / "ranks", folder / "whole.bin"
    made.mkdir(parents=True, exist_ok=True)
    subprocess.run(_python(MAKE, made, ranks, mib), check=True)
    files = sorted(str(path) for path in made.iterdir())
    ptbin = [str(Path(sys.executable).with_name("ptbin")), "convert", "--force", "--quiet"]
    commands = {
        "cat + sha256sum": ["sh", "-c", f"cat {' '.join(files)} > {out} && sha256sum {out}"],
        "ptbin convert": [*ptbin, str(made), str(out)],
    }
    if peers:
        commands["verl's merger, ten lines of torch"] = _python(PEER, out, *files)
    _rounds(commands, out, rounds)
    if peers:
        shutil.rmtree(made)
        dcp = folder / "dcp"
        subprocess.run(_python(MAKE_DCP, dcp, ranks, mib), check=True)
        _rounds(
            {
                "dcp_to_torch_save": _python(DCP_PEER, dcp, out),
                "ptbin convert, the same folder": [*ptbin, str(dcp), str(out)],
            },
            out,
            rounds,
        )


def _rounds(commands: dict[str, list[str]], out: Path, rounds: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            out.unlink(missing_ok=True)
            found[name].append(_run(command))
    medians = {name: statistics.median(seconds for seconds, _ in rows) for name, rows in found.items()}
    for name, rows in found.items():
        spread = f"{min(s for s, _ in rows):.2f} to {max(s for s, _ in rows):.2f}"
        print(f"{name:34} {medians[name]:7.2f} s ({spread})  {max(peak for _, peak in rows):6.0f} MiB")
    if "cat + sha256sum" in medians:
        speed = medians["cat + sha256sum"] / medians["ptbin convert"]
        _bar("speed of ptbin, of cat + sha256sum", speed, BARS["speed"], least=True)
        _bar("peak MiB of ptbin", max(peak for _, peak in found["ptbin convert"]), BARS["MiB"], least=False)


def _planning(folder: Path, ranks: int, rounds: int) -> None:
    made = folder / "plan"
    subprocess.run([sys.executable, "-P", str(SPARSE_RANKS), str(made), str(ranks)], check=True)
    rows = [_run(_python(PLAN, made)) for _ in range(rounds)]
    seconds = statistics.median(row[0] for row in rows)
    print(f"planning 405B in {ranks} rank files: {seconds:.2f} s, {max(peak for _, peak in rows):.0f} MiB")
    _bar("seconds of planning", seconds, BARS["plan seconds"], least=False)
    _bar("MiB of planning", max(peak for _, peak in rows), BARS["MiB"], least=False)


def main() -> None:
    """Make the files and time all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--mib", type=int, default=1024, help="of each rank's file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plan-ranks", type=int, default=64, help="0: no planning")
    parser.add_argument("--no-peers", action="store_true", help="cat and sha256sum alone")
    asked = parser.parse_args()
    folder = asked.folder / "parts"
    try:
        if asked.mib:
            _merging(folder, asked.ranks, asked.mib, asked.rounds, peers=not asked.no_peers)
        if asked.plan_ranks:
            _planning(folder, asked.plan_ranks, asked.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
