"""What `make bench` measures of folders and casts: `python benchmarks/formats.py [--mib 2048] [--report F]`.

    dcp    a torch.distributed.checkpoint folder of 2 ranks: dcp_to_torch_save against ptbin
    cast   one state dict of float32: torch's `.to(torch.bfloat16)` and save against `--dtype bfloat16`

Whole processes in turns, as in `run.py`. Exits 1 if a threshold was missed. Needs 8 GB of disk and of memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from processes import Command, Measured, measure_in_turns, warm
from run import MIB, PTBIN, PYTHON, Verdict

FULL_MIB = 2048

_RANK = """
import sys, torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
folder, rank, mib = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}.init", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
generator = torch.Generator().manual_seed(0)
weights = {}
for index in range(mib // 16):
    whole = torch.empty(2048, 2048).normal_(generator=generator)
    weights[f"blocks.{index}.weight"] = distribute_tensor(whole, mesh, [Shard(0)])
dcp.save({"model": weights}, checkpoint_id=folder)
dist.destroy_process_group()
"""

_STATE_DICT = """
import sys, torch
generator = torch.Generator().manual_seed(0)
count = int(sys.argv[2]) // 16
made = {f"blocks.{i}.weight": torch.empty(2048, 2048).normal_(generator=generator) for i in range(count)}
torch.save(made, sys.argv[1])
"""

_DCP_TO_TORCH = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
"""

_CAST = """
import sys, torch
state_dict = torch.load(sys.argv[1], weights_only=True, mmap=True)
torch.save({name: tensor.to(torch.bfloat16) for name, tensor in state_dict.items()}, sys.argv[2])
"""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _dcp(work: Path, mib: int, rounds: int) -> dict[str, Measured]:
    folder = work / "dcp"
    ranks = [
        subprocess.Popen([PYTHON, "-I", "-W", "ignore", "-c", _RANK, str(folder), str(rank), str(mib)])
        for rank in (0, 1)
    ]
    if any(process.wait() for process in ranks):
        raise RuntimeError("a rank failed")
    for path in folder.iterdir():
        warm(path)
    ours, peers = work / "ours.bin", work / "peers.pt"
    commands = {
        "dcp_to_torch_save": Command([PYTHON, "-I", "-c", _DCP_TO_TORCH, str(folder), str(peers)], peers),
        "ptbin --verify none": Command(
            [PTBIN, "convert", str(folder), str(ours), "--quiet", "--verify", "none"], ours
        ),
        "ptbin": Command([PTBIN, "convert", str(folder), str(ours), "--quiet"], ours),
    }
    measured = measure_in_turns(commands, rounds=rounds, log=work / "log", say=_say)
    for path in (ours, peers, *folder.iterdir()):
        path.unlink(missing_ok=True)
    return measured


def _cast(work: Path, mib: int, rounds: int) -> dict[str, Measured]:
    source, ours, peers = work / "float32.pt", work / "ours.bin", work / "peers.pt"
    subprocess.run([PYTHON, "-I", "-c", _STATE_DICT, str(source), str(mib)], check=True)
    warm(source)
    convert = [PTBIN, "convert", str(source), str(ours), "--quiet", "--dtype", "bfloat16"]
    commands = {
        "torch .to() + save": Command([PYTHON, "-I", "-c", _CAST, str(source), str(peers)], peers),
        "ptbin --dtype bfloat16 --verify none": Command([*convert, "--verify", "none"], ours),
        "ptbin --dtype bfloat16": Command(convert, ours),
    }
    measured = measure_in_turns(commands, rounds=rounds, log=work / "log", say=_say)
    for path in (source, ours, peers):
        path.unlink(missing_ok=True)
    return measured


def _verdicts(dcp: dict[str, Measured], cast: dict[str, Measured]) -> list[Verdict]:
    peer, ours = dcp["dcp_to_torch_save"], dcp["ptbin"]
    torch, casting = cast["torch .to() + save"], cast["ptbin --dtype bfloat16"]
    return [
        Verdict("`dcp_to_torch_save` / ptbin with proof", peer.median / ours.median, 2, "x", at_least=True),
        Verdict("peak memory, ptbin / `dcp_to_torch_save`", ours.peak / peer.peak, 0.1, "x"),
        Verdict("cast with proof / torch's `.to()` + save", casting.median / torch.median, 1.5, "x"),
        Verdict("peak memory of a cast", casting.peak / MIB, 300, "MiB"),
    ]


def _report(mib: int, rounds: int, verdicts: list[Verdict], tables: dict[str, dict[str, Measured]]) -> str:
    lines = [
        "# Benchmarks of folders and casts",
        "",
        f"Made by `make bench`; do not edit by hand. {mib} MiB of float32 in matrices of 16 MiB, page",
        f"cache warm, whole processes in turns, medians over {rounds} rounds, 2 cores.",
        "",
        "| figure | found | bound | kept |",
        "|---|---|---|---|",
        *(verdict.row() for verdict in verdicts),
    ]
    for title, measured in tables.items():
        lines += ["", f"## {title}", "", "| process | median | fastest to slowest | peak memory |"]
        lines.append("|---|---:|---:|---:|")
        for name, runs in measured.items():
            low, high = min(runs.seconds), max(runs.seconds)
            lines.append(
                f"| {name} | {runs.median:.2f} s | {low:.2f} to {high:.2f} s | {runs.peak / MIB:.0f} MiB |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, and write the report if one is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=FULL_MIB)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        work = Path(folder)
        dcp = _dcp(work, arguments.mib, arguments.rounds)
        cast = _cast(work, arguments.mib, arguments.rounds)
    verdicts = _verdicts(dcp, cast)
    tables = {"A folder of 2 ranks to one `.bin`": dcp, "float32 to bfloat16": cast}
    report = _report(arguments.mib, arguments.rounds, verdicts, tables)
    print(report)
    if arguments.report is not None:
        arguments.report.write_text(report)
    return 0 if all(verdict.kept for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
