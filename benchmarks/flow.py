"""What Prefect and the fan-out cost: a thousand small checkpoints through the flow, against a plain loop.

    python benchmarks/flow.py [--count 1000] [--work-dir DIR] [--report docs/benchmarks-flow.md]

The loop calls `ptbin.convert` on the same files with the same parallelism: two threads of one process, and
two processes, as the flow has with `--runner threads`, `processes` and on a Dask cluster of two workers. The
server is running beforehand. What the flow takes is its whole process less one over two files, which
imports and connects as much. Rounds are interleaved, and the median of each is reported with the ratio to
its own loop.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.servers.dask_cluster import dask_cluster  # noqa: E402 - after the path above
from tests.servers.prefect_stack import PrefectStack, descendants  # noqa: E402

THRESHOLD = 1.5
MAKE = """
import sys, torch
from pathlib import Path
count, root = int(sys.argv[1]), Path(sys.argv[2])
for number in range(count):
    path = root / f"run{number % 10}" / f"step{number:05}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    dice = torch.Generator().manual_seed(number)
    weights = {f"layer{k}.weight": torch.randn(148, 148, generator=dice) for k in range(4)}
    state = {k: {"exp_avg": w * 1, "exp_avg_sq": w * w} for k, w in enumerate(weights.values())}
    torch.save({"state_dict": weights, "optimizer_states": [{"state": state}], "epoch": number}, path)
"""
LOOP = """
import sys, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
import ptbin

def one(pair):
    ptbin.convert(*pair)

if __name__ == "__main__":
    kind, source, dest = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    found = sorted(source.rglob("*.ckpt"))
    pairs = [(str(p), str(dest / p.relative_to(source).with_suffix(".bin"))) for p in found]
    with (ThreadPoolExecutor if kind == "threads" else ProcessPoolExecutor)(2) as pool:
        list(pool.map(abs, range(4)))
        began = time.perf_counter()
        list(pool.map(one, pairs, chunksize=10))
        print(time.perf_counter() - began)
"""
COMMAND = "from flows.cli import main\nif __name__ == '__main__':\n    main()\n"


def resident(pid: int) -> int:
    """Bytes in memory of a process and all below it."""
    total = 0
    for one in [pid, *descendants(pid)]:
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        except OSError:
            continue
    return total


def main() -> int:
    """Measure, print, write the report; 1 where a threshold was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "benchmarks-flow.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        return measure(Path(name), arguments.count, arguments.rounds, arguments.report)


def measure(folder: Path, count: int, rounds: int, report: Path) -> int:
    source, dest = folder / "source", folder / "dest"
    subprocess.run([sys.executable, "-I", "-c", MAKE, str(count), str(source)], check=True)
    nbytes = sum(path.stat().st_size for path in source.rglob("*.ckpt"))
    (folder / "loop.py").write_text(LOOP)
    (folder / "stack").mkdir()
    (folder / "dask").mkdir()
    stack = PrefectStack(folder / "stack")
    few = folder / "few"
    subprocess.run([sys.executable, "-I", "-c", MAKE, "2", str(few)], check=True)
    times: dict[str, list[float]] = {}
    whole: dict[str, list[float]] = {}
    task_runs: dict[str, int] = {}
    try:
        stack.start_server()
        assert stack.server is not None

        def flow_on(runner: str, *more: str) -> Callable[[], float]:
            words = ["--runner", runner, "--workers", "2", *more]

            def both() -> float:
                least = flow(stack, few, folder / "few-dest", words, 2, task_runs, runner)
                shutil.rmtree(folder / "few-dest")
                took = flow(stack, source, dest, words, count, task_runs, runner)
                whole.setdefault(f"flow, {runner}", []).append(took)
                return took - least

            return both

        def turns(cases: dict[str, Callable[[], float]]) -> None:
            for _ in range(rounds):
                for case, run in cases.items():
                    shutil.rmtree(dest, ignore_errors=True)
                    os.sync()  # what the one before wrote is not this one's burden
                    times.setdefault(case, []).append(run())
                    print(f"{case}: {times[case][-1]:.2f} s", flush=True)

        flow_on("threads")()  # a server's first run of a flow takes it some seconds more
        whole.clear()
        turns(
            {
                "loop, 2 threads": lambda: loop(folder, "threads", source, dest),
                "flow, threads": flow_on("threads"),
            }
        )
        with dask_cluster(folder / "dask") as cluster:
            on_dask = flow_on("dask", "--runner-address", cluster.address)
            shutil.rmtree(dest)
            on_dask()  # a worker's first batch imports torch, once in its life
            whole.pop("flow, dask")
            turns(
                {
                    "loop, 2 processes": lambda: loop(folder, "processes", source, dest),
                    "flow, processes": flow_on("processes"),
                    "flow, dask": on_dask,
                }
            )
        memory = resident(stack.server.pid)
        database = (folder / "stack" / "home" / "prefect.db").stat().st_size
    finally:
        stack.stop()
    text, good = written(count, nbytes, times, whole, task_runs, memory, database, rounds)
    report.write_text(text)
    print(text)
    return 0 if good else 1


def loop(folder: Path, kind: str, source: Path, dest: Path) -> float:
    words = [sys.executable, "-I", str(folder / "loop.py"), kind, str(source), str(dest)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def flow(
    stack: PrefectStack,
    source: Path,
    dest: Path,
    words: list[str],
    count: int,
    runs: dict[str, int],
    name: str,
) -> float:
    """Seconds of the whole process."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-I", "-c", COMMAND, "convert", str(source), str(dest), "--json", *words],
        env=stack.environment,
        check=True,
        capture_output=True,
        text=True,
    )
    took = time.perf_counter() - began
    summary: dict[str, Any] = json.loads(done.stdout)
    assert summary["converted"] == count
    question = {"sort": "START_TIME_DESC", "limit": 1}
    time.sleep(2)  # the server records task runs as they come
    runs[name] = stack.ask("/flow_runs/filter", question)[0]["run_count"] and stack.ask(
        "/task_runs/count",
        {"flow_runs": {"id": {"any_": [stack.ask("/flow_runs/filter", question)[0]["id"]]}}},
    )
    return took


def written(
    count: int,
    nbytes: int,
    times: dict[str, list[float]],
    whole: dict[str, list[float]],
    task_runs: dict[str, int],
    memory: int,
    database: int,
    rounds: int,
) -> tuple[str, bool]:
    """The report, and whether every threshold was kept."""
    base = {"threads": "loop, 2 threads", "processes": "loop, 2 processes", "dask": "loop, 2 processes"}
    about = (
        f"Written by `benchmarks/flow.py`: {count:,} checkpoints of {nbytes / count / 2**20:.2f} MiB, a "
        f"third weights, on {os.cpu_count()} cores with the server on the same ones; median of {rounds} "
        "interleaved rounds. *process* is the whole command, imports and connection included, and "
        "*checkpoints* that less the same over two of them; the server was up and the Dask workers warm "
        "beforehand."
    )
    lines = [
        f"# Prefect's share: {count:,} checkpoints through the flow",
        "",
        about,
        "",
        "| | checkpoints, s | ratio to its loop | process, s | task runs |",
        "|---|---|---|---|---|",
    ]
    good = True
    for case, seconds in times.items():
        middle = statistics.median(seconds)
        ratio = ""
        runner = case.removeprefix("flow, ")
        if runner in base:
            found = middle / statistics.median(times[base[runner]])
            ratio = f"{found:.2f}"
            if runner != "processes" and found > THRESHOLD:
                good = False
                ratio += f" (threshold {THRESHOLD})"
        process = f"{statistics.median(whole[case]):.2f}" if case in whole else ""
        lines.append(f"| {case} | {middle:.2f} | {ratio} | {process} | {task_runs.get(runner, '')} |")
    held = f"the server held {memory / 2**20:.0f} MiB of memory and its database {database / 2**20:.1f} MiB"
    lines += ["", f"After {rounds * 3 + 2} such runs, and as many over two, {held}.", ""]
    return "\n".join(lines), good


if __name__ == "__main__":
    sys.exit(main())
