"""How conversion scales with the cores: one large checkpoint, and 32 small ones at once.

    python benchmarks/cores.py --dir /dev/shm/bench --gib 8 --json found.json
    python benchmarks/cores.py --dir /dev/shm/bench --disk /data/bench --gib 4 --profile

Whole processes, bound to the first 1, 2, 4, ... cores; peers in the same run, in turns: `cp`, `sha256sum`,
and a script that maps the checkpoint with torch, keeps the state dict and saves it, which proves nothing.
Needs Python, NumPy and torch, and no more of ptbin than the engine, which it takes from this checkout.
`--budget` ends it in time, with what there is by then. `cores_report.py` makes a page and a plot of the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHILD = str(Path(__file__).with_name("cores_child.py"))
MIB = 1 << 20
SMALL_COUNT = 32

PROVEN, NO_DIGEST, UNPROVEN = "ptbin", "ptbin --file-digest none", "ptbin --verify none"
CAST, SHARDS = "ptbin --dtype bfloat16", "ptbin --max-shard-size 500MB"
ROWS: dict[str, dict[str, Any]] = {
    PROVEN: {},
    NO_DIGEST: {"file_digest": "none"},
    UNPROVEN: {"verify": "none"},
    CAST: {"dtype": "bfloat16"},
    SHARDS: {"max_shard_size": 500_000_000},
}
"""What each of ours asks for."""


class Bench:
    """Runs commands while there is time, and keeps their seconds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._ends = time.monotonic() + options.budget
        self._longest: dict[tuple[str, int], float] = {}
        self.found: dict[str, Any] = {"machine": machine(), "settings": settings(options)}

    def left(self) -> float:
        return float(self._ends - time.monotonic())

    def run(self, command: Sequence[str], cores: int) -> tuple[float, float | None]:
        """Seconds of the process, and of its work alone where it says them."""
        whole = cores >= available() or shutil.which("taskset") is None
        bound = list(command) if whole else ["taskset", "-c", f"0-{cores - 1}", *command]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles all that it imports
        began = time.monotonic()
        done = subprocess.run(bound, check=True, env=environment, capture_output=True, text=True)
        taken = time.monotonic() - began
        inside = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("worked ")]
        return taken, float(inside[0]) if inside else None

    def rows(
        self,
        title: str,
        commands: dict[tuple[str, int], list[str]],
        clear: Sequence[Path],
        *,
        all_cores: bool = False,
    ) -> None:
        """One turn of each command; the second part of a key is its cores, or how many are at it at once on
        all cores. `clear`: folders emptied before each.
        """
        rows = self.found.setdefault(title, {})
        for key, command in commands.items():
            if self.left() < 1.3 * self._longest.get((title + key[0], key[1]), 1.0):
                continue
            for folder in clear:
                for file in folder.iterdir():
                    file.unlink()
            taken, inside = self.run(command, available() if all_cores else key[1])
            self._longest[title + key[0], key[1]] = taken
            rows.setdefault(key[0], {}).setdefault(str(key[1]), []).append(round(taken, 3))
            if inside is not None:
                name = f"{key[0]}, without Python's start"
                rows.setdefault(name, {}).setdefault(str(key[1]), []).append(round(inside, 3))
            print(f"{title}: {key[0]}, {key[1]}: {taken:.2f} s", flush=True)
            self.write()

    def write(self) -> None:
        """What there is so far: whatever ends this, its figures stay."""
        if self._options.json is not None:
            self._options.json.write_text(json.dumps(self.found, indent=1) + "\n")


def available() -> int:
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    flags = Path("/proc/cpuinfo").read_text()
    return {
        "cores": available(),
        "processor": model,
        "sha_extensions": " sha_ni" in flags,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
    }


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "large_gib": options.gib,
        "small_mib": options.small_mib,
        "small_count": SMALL_COUNT,
        "disk_gib": options.disk_gib if options.disk is not None else None,
    }


def options_of(row: str) -> str:
    return json.dumps(ROWS[row])


def powers(limit: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= limit:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == limit else [*counts, limit]


def child(*words: object) -> list[str]:
    return [sys.executable, "-P", CHILD, *map(str, words)]


class Large:
    """One checkpoint in a folder, and what is done with it."""

    def __init__(self, bench: Bench, folder: Path, gib: float, counts: list[int], title: str) -> None:
        self._bench, self._title = bench, title
        source, given, out = folder / "in" / "large.pt", folder / "given" / "large.bin", folder / "out"
        for place in (source.parent, given.parent, out):
            place.mkdir(parents=True)
        self._out = out
        most = max(counts)
        bench.run(child("checkpoint", source, int(gib * 1024)), most)
        bench.run(child("convert", source, given, options_of(UNPROVEN)), most)  # what the peers copy and hash
        copy = str(out / "copy")
        self._turn: dict[tuple[str, int], list[str]] = {
            ("cp", most): ["cp", str(given), copy],
            ("sha256sum", most): ["sha256sum", str(given)],
            ("cp, sync of the copy", most): ["sh", "-c", f"cp '{given}' '{copy}' && sync '{copy}'"],
            ("Python's start", most): [sys.executable, "-I", "-c", "pass"],
            ("a script: torch.load(mmap=True) + torch.save", most): child("torch", source, copy),
        }
        for n in reversed(counts):
            for name in ROWS:
                # Where nothing is proven the kernel copies, and the cores hardly matter.
                if name in (PROVEN, NO_DIGEST) or n in (most, 4):
                    words = child("convert", source, out / "large.bin", options_of(name))
                    self._turn[name, n] = words
        self.profiled = child("profile", "{}", "convert", source, out / "large.bin", options_of(PROVEN))

    def turn(self, *, few_cores: bool = True) -> None:
        """`few_cores`: also the runs on one core and on two, which take longest."""
        most = max(n for _, n in self._turn)
        commands = {
            key: command for key, command in self._turn.items() if few_cores or key[1] > min(2, most - 1)
        }
        self._bench.rows(self._title, commands, [self._out])


class Many:
    """32 small checkpoints, 1, 2, 4, ... at once."""

    def __init__(self, bench: Bench, folder: Path, mib: int, counts: list[int]) -> None:
        self._bench, self._out = bench, folder / "out"
        small, given = folder / "small", folder / "given"
        for place in (small, given, self._out):
            place.mkdir(parents=True)
        bench.run(child("checkpoint", small / "00.pt", mib), max(counts))
        for index in range(1, SMALL_COUNT):
            shutil.copyfile(small / "00.pt", small / f"{index:02}.pt")
        bench.run(
            child("many", small, given, options_of(UNPROVEN), max(counts), "threads"),
            max(counts),
        )
        self._turns: list[dict[tuple[str, int], list[str]]] = []
        for n in reversed(counts):
            script = f"cp F '{self._out}/F' && sha256sum '{self._out}/F'"
            shell = f"cd '{given}' && ls *.bin | xargs -P {n} -I F sh -c \"{script}\""
            turn = {("cp + sha256sum, xargs -P", n): ["sh", "-c", shell]}
            for name in (PROVEN, NO_DIGEST, UNPROVEN):
                for how in ("threads", "processes"):
                    if how == "threads" or name == PROVEN:
                        words = child("many", small, self._out, options_of(name), n, how)
                        turn[f"{name}, {how}", n] = words
            self._turns.append(turn)
        self.steps = child("steps", small, self._out, max(counts), "{}")
        self.profiled = child(
            "profile", "{}", "many", small, self._out, options_of(PROVEN), max(counts), "threads"
        )

    def turn(self) -> None:
        for turn in self._turns:
            self._bench.rows("many", turn, [self._out], all_cores=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("benchmarks/work"), help="best in tmpfs")
    parser.add_argument("--disk", type=Path, help="a folder on a disk, for one more table")
    parser.add_argument("--gib", type=float, default=2.0, help="weights of the large checkpoint")
    parser.add_argument("--disk-gib", type=float, default=2.0)
    parser.add_argument("--small-mib", type=int, default=113, help="weights of each small one")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--budget", type=float, default=280.0, help="seconds")
    parser.add_argument("--cores", help="1,2,4,... (default: powers of two, and all)")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, into the JSON")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    counts = [int(n) for n in options.cores.split(",")] if options.cores else powers(available())
    bench = Bench(options)
    folders = [options.dir, *([options.disk] if options.disk else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=False)
    try:
        measure(bench, options, counts)
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        bench.write()


def measure(bench: Bench, options: argparse.Namespace, counts: list[int]) -> None:
    large = Large(bench, options.dir / "large", options.gib, counts, "large")
    large.turn()
    if options.profile:
        profile(bench, options.dir, large.profiled, "one large")
    many = Many(bench, options.dir / "many", options.small_mib, counts)
    many.turn()
    if options.profile:
        profile(bench, options.dir, many.profiled, "many at once")
        profile(bench, options.dir, many.steps, "many at once, steps of MiB")
    disk = None
    if options.disk is not None:
        disk = Large(bench, options.disk / "large", options.disk_gib, [max(counts)], "disk")
        disk.turn()
    for _ in range(options.runs - 1):
        large.turn(few_cores=False)
        many.turn()
        if disk is not None:
            disk.turn()


def profile(bench: Bench, folder: Path, command: list[str], what: str) -> None:
    place = folder / "profile.json"
    bench.run([word.replace("{}", str(place)) for word in command], available())
    bench.found.setdefault("profiles", {})[what] = json.loads(place.read_text())


if __name__ == "__main__":
    main()
