"""The way back: `python benchmarks/restore.py [--mib 1024] [--rounds 3] [--work-dir DIR]`.

    state dict   `ptbin restore` of a `.bin` against `cp` and `sha256sum` of it
    module       `ptbin restore --model` against a torch script that maps the file, assigns and saves

Whole processes in turns, as in `run.py`. Exits 1 if a threshold was missed. Needs 4 GB of disk and of memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from processes import Command, measure_in_turns, warm
from run import MIB, PTBIN, PYTHON, Verdict

_NET = """
from torch import nn

def net(layers):
    return nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(layers)])
"""

_MAKE = """
import sys
sys.path.append(sys.argv[1])
import bench_net, torch
torch.save(bench_net.net(int(sys.argv[3])).state_dict(), sys.argv[2])
"""

_SCRIPT = """
import sys
sys.path.append(sys.argv[1])
import bench_net, torch
model = bench_net.net(int(sys.argv[4]))
model.load_state_dict(torch.load(sys.argv[2], weights_only=True, mmap=True), assign=True)
torch.save(model, sys.argv[3])
"""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        verdicts = measure(Path(name), max(1, arguments.mib // 64), arguments.rounds)
    for verdict in verdicts:
        good = verdict.found <= verdict.bound
        print(f"{verdict.what}: {verdict.found:.2f} (at most {verdict.bound}) {'ok' if good else 'MISSED'}")
    return 0 if all(verdict.found <= verdict.bound for verdict in verdicts) else 1


def measure(work: Path, layers: int, rounds: int) -> list[Verdict]:
    (work / "bench_net.py").write_text(_NET)
    source, weights = work / "source.pt", work / "weights.bin"
    subprocess.run([PYTHON, "-I", "-c", _MAKE, str(work), str(source), str(layers)], check=True)
    subprocess.run([PTBIN, "convert", str(source), str(weights), "--quiet"], check=True)
    source.unlink()
    warm(weights)
    copy, plain, script, module = (work / f"{name}.pt" for name in ("copy", "plain", "script", "module"))
    both = f"cp {weights} {copy} && sha256sum {copy}"
    restore = [PTBIN, "restore", str(weights), "--quiet"]
    by_script = [PYTHON, "-I", "-c", _SCRIPT, str(work), str(weights), str(script), str(layers)]
    model = ["--model", "bench_net:net", "--model-path", str(work), "--model-args", f"[{layers}]"]
    commands = {
        "cp + sha256sum": Command(["sh", "-c", both], copy),
        "restore": Command([*restore, str(plain)], plain),
        "torch script": Command(by_script, script),
        "restore --model": Command([*restore, str(module), *model], module),
    }
    measured = measure_in_turns(commands, rounds=rounds, log=work / "log", say=_say)
    for name, found in measured.items():
        print(f"{name}: {found.median:.2f} s, peak {found.peak / MIB:.0f} MiB")
    return [
        Verdict(
            "restore / cp + sha256sum",
            measured["restore"].median / measured["cp + sha256sum"].median,
            1.3,
            "x",
        ),
        Verdict(
            "restore --model / torch script",
            measured["restore --model"].median / measured["torch script"].median,
            1.5,
            "x",
        ),
        Verdict(
            "peak of restore --model / of the torch script",
            measured["restore --model"].peak / measured["torch script"].peak,
            1.1,
            "x",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
