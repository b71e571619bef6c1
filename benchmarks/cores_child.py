"""What `cores.py` measures, each in a process of its own: `python cores_child.py WHAT ARGUMENTS...`.

    checkpoint PATH MIB             a training dict with about MIB of weights and a quarter as much of Adam's
    convert SOURCE DEST OPTIONS     (a JSON object)
    many FOLDER OUT OPTIONS AT_ONCE threads|processes
    steps FOLDER OUT AT_ONCE JSON
    torch SOURCE DEST               the script that maps the checkpoint and saves its weights, proving nothing
    profile PATH WHAT ...           one of these, and into PATH where its threads were and what they used

Needs Python, NumPy, torch (for `checkpoint` and `torch` alone) and ptbin's engine on PYTHONPATH.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

MIB = 1 << 20
SAMPLE_SECONDS = 0.004
FRAMES = 4


def make_checkpoint(path: str, mib: str) -> None:
    """Weights in tensors of 64 MiB at most, no two alike."""
    import torch

    nbytes = int(mib) * MIB
    size = min(64 * MIB, max(nbytes // 8, 4096)) // 4
    count = max(1, nbytes // (4 * size))
    noise = torch.randint(0, 1 << 31, (size,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    model = {f"layers.{i}.weight": (noise + i).view(torch.float32) for i in range(count)}
    moments = {i: {"exp_avg": torch.zeros(size), "step": torch.tensor(1.0)} for i in range(count // 4)}
    groups = [{"params": list(moments)}]
    torch.save({"model": model, "optimizer": {"state": moments, "param_groups": groups}}, path)


def convert(source: str, dest: str, options: str) -> None:
    import ptbin

    ptbin.convert(source, dest, ptbin.ConvertOptions(force=True, **json.loads(options)))


def convert_many(folder: str, out: str, options: str, at_once: str, how: str) -> None:
    import ptbin

    hash((ptbin.convert, ptbin.ConvertOptions))  # imported now, before the clock runs
    names = sorted(os.listdir(folder))
    began = time.monotonic()
    pool = ProcessPoolExecutor if how == "processes" else ThreadPoolExecutor
    with pool(int(at_once)) as workers:
        jobs = [workers.submit(convert, f"{folder}/{name}", f"{out}/{name}.bin", options) for name in names]
        for job in jobs:
            job.result()
        sys.stdout.write(f"worked {time.monotonic() - began:.3f}\n")


def compare_steps(folder: str, out: str, at_once: str, place: str) -> None:
    """Seconds with files hashed by the threads that write them, in steps of some sizes, and by lanes of each
    file's own instead (0): how `written.STEP_NBYTES` was chosen.
    """
    from ptbin.cores import is_crowded
    from ptbin.proof import written

    found: dict[int, list[float]] = {}
    for _ in range(3):
        for mib in (0, 1, 2, 4, 16):
            vars(written).update(is_crowded=is_crowded if mib else bool, STEP_NBYTES=mib * MIB)
            for file in Path(out).iterdir():
                file.unlink()
            began = time.monotonic()
            convert_many(folder, out, "{}", at_once, "threads")
            found.setdefault(mib, []).append(round(time.monotonic() - began, 3))
    Path(place).write_text(json.dumps(found) + "\n")


def save_with_torch(source: str, dest: str) -> None:
    import torch

    state = torch.load(source, map_location="cpu", mmap=True, weights_only=True)["model"]
    torch.save(state, dest)


# -- where the time goes ------------------------------------------------------------------------------


class Profile:
    """Samples of every thread's innermost frames, and the processor time of each thread.

    Sampling takes the interpreter's lock every few milliseconds: for shares, not for times.
    """

    def __init__(self) -> None:
        self._frames: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._used: dict[int, tuple[str, float, float]] = {}
        self._late: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")
        self._began = time.monotonic()

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._done.is_set():
            asked = time.monotonic()
            time.sleep(SAMPLE_SECONDS)
            self._late.append(time.monotonic() - asked - SAMPLE_SECONDS)
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():  # noqa: SLF001 - what the standard library offers
                kind = names.get(ident, "?").rstrip("0123456789").rstrip("_-")
                if kind != "sampler":
                    self._frames[kind][_where(frame)] += 1
            if len(self._late) % 8 == 0:
                self._look_at_threads()

    def _look_at_threads(self) -> None:
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        tick = os.sysconf("SC_CLK_TCK")
        for task in os.listdir("/proc/self/task"):
            try:
                words = Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            name = names.get(int(task)) or self._used.get(int(task), ("other",))[0]
            self._used[int(task)] = (name, int(words[11]) / tick, int(words[12]) / tick)

    def stop(self) -> dict[str, Any]:
        wall = time.monotonic() - self._began
        self._look_at_threads()
        self._done.set()
        self._thread.join()
        late = sorted(self._late)
        threads = sorted(self._used.values(), key=lambda used: -used[1] - used[2])
        return {
            "wall": round(wall, 3),
            "cpu": [round(seconds, 2) for seconds in os.times()[:2]],
            "threads": [{"name": n, "user": user, "system": system} for n, user, system in threads[:40]],
            # How long a thread that is ready waits for the interpreter's lock.
            "lock_wait_ms": {
                name: round(late[int(len(late) * share)] * 1000, 3)
                for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
            }
            if late
            else {},
            "frames": {
                kind: [
                    {"share": round(count / counts.total(), 3), "samples": count, "where": where}
                    for where, count in counts.most_common(8)
                ]
                for kind, counts in self._frames.items()
            },
        }


def _where(frame: Any) -> str:
    found: list[str] = []
    while frame is not None and len(found) < FRAMES:
        code = frame.f_code
        found.append(f"{code.co_name}:{frame.f_lineno} ({os.path.basename(code.co_filename)})")
        frame = frame.f_back
    return " < ".join(found)


def profiled(path: str, what: str, *arguments: str) -> None:
    import ptbin  # noqa: F401 - so that importing is no part of it

    profile = Profile()
    profile.start()
    try:
        KINDS[what](*arguments)
    finally:
        Path(path).write_text(json.dumps(profile.stop(), indent=1))


KINDS: dict[str, Any] = {
    "checkpoint": make_checkpoint,
    "convert": convert,
    "many": convert_many,
    "steps": compare_steps,
    "torch": save_with_torch,
    "profile": profiled,
}

if __name__ == "__main__":
    KINDS[sys.argv[1]](*sys.argv[2:])
