"""`make bench`: what a conversion costs, against what the machine's own tools cost, in one run.

    python benchmarks/run.py [--work-dir DIR] [--mib 2950] [--rounds 5] [--report docs/benchmarks.md]

Needs about 10 GB of disk below DIR (default: the system's folder for temporary files) and 7 GB of memory,
both for torch's part. Everything it makes is removed. Exits 1 if a threshold was missed. The report is
written only at full size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from processes import Command, Measured, measure_in_turns, warm

MIB = 1 << 20
FULL_MIB = 2950
"""Weights of 0.96 GiB and twice as much of Adam's moments."""

PTBIN = str(Path(sysconfig.get_path("scripts")) / "ptbin")
PYTHON = sys.executable
HERE = Path(__file__).parent

_LOAD_AND_SAVE = """
import sys, torch
content = torch.load(sys.argv[1], weights_only=True, map_location="cpu", mmap=sys.argv[3] == "mmap")
torch.save(content["state_dict"], sys.argv[2])
"""

_PLAIN_LOOP = """
import pathlib, sys, ptbin
source, dest = map(pathlib.Path, sys.argv[1:])
for path in sorted(source.rglob("*.ckpt")):
    target = dest / path.relative_to(source).with_suffix(".bin")
    target.parent.mkdir(parents=True, exist_ok=True)
    ptbin.convert(str(path), str(target))
"""


@dataclass(frozen=True)
class Verdict:
    """One line of the report: a figure, what it may be at most (or at least), and whether it is."""

    what: str
    found: float
    bound: float
    unit: str
    at_least: bool = False

    @property
    def kept(self) -> bool:
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def row(self) -> str:
        sign = "at least" if self.at_least else "at most"
        found, bound = f"{self.found:.2f} {self.unit}".strip(), f"{self.bound:.2f} {self.unit}".strip()
        return f"| {self.what} | {found} | {sign} {bound} | {'yes' if self.kept else '**no**'} |"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _make(kind: str, path: Path, number: int) -> None:
    subprocess.run([PYTHON, "-I", str(HERE / "inputs.py"), kind, str(path), str(number)], check=True)


def _one_large_file(work: Path, mib: int, rounds: int) -> tuple[dict[str, Measured], int, int]:
    source, output = work / "large.ckpt", work / "large.bin"
    _say(f"making a checkpoint of {mib} MiB")
    _make("adam", source, mib)
    warm(source)
    subprocess.run([PTBIN, "convert", str(source), str(output), "--quiet"], check=True)
    reference = work / "reference.bin"
    output.rename(reference)
    copy, saved = work / "copy.bin", work / "torch.bin"
    flushed = f'cp "{reference}" "{copy}" && sync "{copy}"'
    both = f'cp "{reference}" "{copy}" && sha256sum "{copy}"'
    convert = [PTBIN, "convert", str(source), str(output), "--quiet"]
    load_and_save = [PYTHON, "-I", "-c", _LOAD_AND_SAVE, str(source), str(saved)]
    commands = {
        "python start": Command([PYTHON, "-I", "-c", "pass"]),
        "cp": Command(["cp", str(reference), str(copy)], copy),
        # ptbin's outputs are on disk when it ends, `cp`'s are not: no bound, but the comparison like for like
        "cp + sync of the copy": Command(["sh", "-c", flushed], copy),
        "ptbin --verify none": Command([*convert, "--verify", "none"], output),
        "cp + sha256sum": Command(["sh", "-c", both], copy),
        "ptbin": Command(convert, output),
    }
    by_torch = {
        "torch.load + torch.save": Command([*load_and_save, "plain"], saved),
        "torch.load(mmap=True) + torch.save": Command([*load_and_save, "mmap"], saved),
    }
    # More rounds where the bounds are tight, and torch's gigabytes of memory out of the way meanwhile.
    measured = measure_in_turns(commands, rounds=2 * rounds + 1, log=work / "log", say=_say)
    measured |= measure_in_turns(by_torch, rounds=rounds, log=work / "log", say=_say)
    sizes = source.stat().st_size, reference.stat().st_size
    for path in (source, output, reference, copy, saved):
        path.unlink(missing_ok=True)
    return measured, *sizes


def _medium_file(work: Path, mib: int, rounds: int) -> dict[str, Measured]:
    source, output = work / "medium.ckpt", work / "medium.bin"
    _make("adam", source, mib)
    convert = [PTBIN, "convert", str(source), str(output), "--quiet"]
    commands = {
        "ptbin --verify none": Command([*convert, "--verify", "none"], output),
        "ptbin": Command(convert, output),
    }
    measured = measure_in_turns(commands, rounds=rounds, log=work / "log", say=_say)
    source.unlink()
    return measured


def small_file(work: Path, rounds: int) -> Measured:
    source, output = work / "small.pt", work / "small.bin"
    _make("small", source, 0)
    command = Command([PTBIN, "convert", str(source), str(output), "--quiet"], output)
    return measure_in_turns({"small file": command}, rounds=rounds, log=work / "log", say=_say)["small file"]


@dataclass(frozen=True)
class FlowTimes:
    """Seconds of whole processes: the flow over many small files and over one, and the plain loop."""

    whole: float
    whole_of_one: float
    loop: float

    @property
    def ratio(self) -> float:
        """The flow over many less the flow over one, which starts as much, to the loop."""
        return (self.whole - self.whole_of_one) / self.loop


def _many_small_files(work: Path, count: int) -> FlowTimes:
    source, lonely = work / "many", work / "lonely"
    _say(f"making {count} small checkpoints")
    _make("many", source, count)
    _make("many", lonely, 1)
    log = work / "log"
    loop = Command([PYTHON, "-I", "-c", _PLAIN_LOOP, str(source), str(work / "by-loop")])
    looped = measure_in_turns({"plain loop": loop}, rounds=1, log=log, say=_say)["plain loop"]
    options = ["--workers", "2", "--force", "--json"]
    one = Command([PTBIN, "convert", str(lonely), str(work / "lonely-by-flow"), *options])
    every = Command([PTBIN, "convert", str(source), str(work / "by-flow"), *options])
    # once each, after the unmeasured run: the loop's files were new at its unmeasured run, too
    ones = measure_in_turns({"flow over 1": one}, rounds=1, log=log, say=_say)["flow over 1"]
    alls = measure_in_turns({f"flow over {count}": every}, rounds=1, log=log, say=_say)[f"flow over {count}"]
    summary = json.loads(next(line for line in _json_documents(log)))
    if summary["converted"] != count:
        raise RuntimeError(f"the flow converted {summary['converted']} of {count}")
    return FlowTimes(alls.median, ones.median, looped.median)


def _json_documents(log: Path) -> list[str]:
    text = log.read_text()
    return [text[text.index("{") : text.rindex("}") + 1]]


def _verdicts(
    large: dict[str, Measured], medium: dict[str, Measured], small: Measured, flow: FlowTimes
) -> list[Verdict]:
    none, default = large["ptbin --verify none"], large["ptbin"]
    copy, start = large["cp"].median, large["python start"].median
    peak = max(m.peak for m in (none, default, *medium.values())) / MIB
    growth = (max(none.peak, default.peak) - max(m.peak for m in medium.values())) / MIB
    return [
        Verdict(
            "`--verify none` / (`cp` of the output + Python's start)", none.median / (copy + start), 1.5, "x"
        ),
        Verdict(
            "`torch.load` + `torch.save` / `--verify none`",
            large["torch.load + torch.save"].median / none.median,
            8,
            "x",
            at_least=True,
        ),
        Verdict(
            "default (`checksum`) / (`cp` + `sha256sum` of the output)",
            default.median / large["cp + sha256sum"].median,
            1.3,
            "x",
        ),
        Verdict("peak memory, any size", peak, 100, "MiB"),
        Verdict("peak memory, large file less medium file", growth, 8, "MiB"),
        Verdict("one small file, whole process", small.median, 0.5, "s"),
        Verdict("flow with 2 workers / plain loop over the engine", flow.ratio, 3, "x"),
    ]


def _report(
    mib: int,
    sizes: tuple[int, int],
    large: dict[str, Measured],
    medium: dict[str, Measured],
    flow: FlowTimes,
    verdicts: Sequence[Verdict],
    rounds: int,
    count: int,
) -> str:
    source, output = (f"{size / (1 << 30):.2f} GiB" for size in sizes)
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench`; do not edit by hand. Whole processes in turns, medians over {2 * rounds + 1}",
        f"rounds (torch: {rounds}), page cache warm, local disk, {os.cpu_count()} cores,",
        f"Python {platform.python_version()},",
        f"torch {metadata.version('torch').partition('+')[0]}.",
        "",
        "| figure | found | bound | kept |",
        "|---|---|---|---|",
        *(verdict.row() for verdict in verdicts),
        "",
        f"## One checkpoint of {source} with Adam state, {output} of weights",
        "",
        "| process | median | fastest to slowest | peak memory |",
        "|---|---:|---:|---:|",
    ]
    for name, measured in large.items():
        spread = f"{min(measured.seconds):.2f} to {max(measured.seconds):.2f} s"
        lines.append(f"| {name} | {measured.median:.2f} s | {spread} | {measured.peak / MIB:.0f} MiB |")
    lines += [
        "",
        f"The same at a tenth of the size ({mib // 10} MiB):",
        "",
        "| process | median | peak memory |",
        "|---|---:|---:|",
        *(f"| {name} | {m.median:.2f} s | {m.peak / MIB:.0f} MiB |" for name, m in medium.items()),
        "",
        f"## {count} small checkpoints, 2 workers, embedded server",
        "",
        "| | seconds |",
        "|---|---:|",
        f"| plain loop over `ptbin.convert`, whole process | {flow.loop:.2f} |",
        f"| flow, whole process | {flow.whole:.2f} |",
        f"| flow over one checkpoint, whole process | {flow.whole_of_one:.2f} |",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work-dir", type=Path, help="where the files go; default: a temporary folder")
    parser.add_argument("--mib", type=int, default=FULL_MIB, help="size of the large checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=300, help="small checkpoints for the flow")
    parser.add_argument("--report", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    wishes = parser.parse_args(arguments)
    if wishes.work_dir:
        wishes.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ptbin-bench-", dir=wishes.work_dir) as folder:
        work = Path(folder)
        large, source_nbytes, output_nbytes = _one_large_file(work, wishes.mib, wishes.rounds)
        medium = _medium_file(work, wishes.mib // 10, wishes.rounds)
        small = small_file(work, 2 * wishes.rounds)
        flow = _many_small_files(work, wishes.count)
    verdicts = _verdicts(large, medium, small, flow)
    sizes = (source_nbytes, output_nbytes)
    report = _report(wishes.mib, sizes, large, medium, flow, verdicts, wishes.rounds, wishes.count)
    print(report)
    if wishes.mib >= FULL_MIB:
        wishes.report.write_text(report, encoding="utf-8")
        _say(f"written: {wishes.report}")
    return 0 if all(verdict.kept for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
