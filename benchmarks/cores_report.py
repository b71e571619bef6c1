"""What `cores.py` found, as a page with verdicts and a plot: `python cores_report.py PAGE JSON...`.

Several files of one machine (the same number of cores) are taken together. Measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bars import STYLE
from cores import NO_DIGEST, PROVEN, UNPROVEN

Rows = Mapping[str, Mapping[str, Sequence[float]]]

CP, SYNCED, SHA = "cp", "cp, sync of the copy", "sha256sum"
SCRIPT = "a script: torch.load(mmap=True) + torch.save"
START = "Python's start"
XARGS = "cp + sha256sum, xargs -P"
THREADS, PROCESSES = f"{PROVEN}, threads", f"{PROVEN}, processes"

HEAD = """# Cores

Made by `benchmarks/cores_report.py` of what `benchmarks/cores.py` measured; do not edit by hand. Whole
processes in turns, bound to the first 1, 2, 4, ... cores by `taskset`, medians (fastest to slowest); what was
written before is removed before each. A checkpoint is a training dict, its output the weights in it. `ptbin`
alone proves its output (`--verify checksum`): a SHA-256 of the file and of each tensor, a CRC-32 of each
byte. The script proves nothing.

    python benchmarks/cores.py --dir /dev/shm/bench --gib 8 --json found.json

needs Python, NumPy, torch and this checkout.
"""


@dataclass(frozen=True)
class Machine:
    """Everything that was measured on one."""

    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    tables: Mapping[str, Rows]
    limits: Mapping[str, Mapping[str, float]]

    @property
    def cores(self) -> int:
        return int(self.facts["cores"])

    def median(self, table: str, row: str, count: int) -> float | None:
        times = self.tables.get(table, {}).get(row, {}).get(str(count))
        return statistics.median(times) if times else None


def read(paths: Sequence[Path]) -> list[Machine]:
    found: dict[int, Machine] = {}
    for path in paths:
        data = json.loads(path.read_text())
        if "machine" not in data:  # of cores_limits.py
            machine = max(found.values(), key=lambda machine: machine.cores)
            found[machine.cores] = Machine(machine.facts, machine.settings, machine.tables, data)
            continue
        cores = data["machine"]["cores"]
        known = found.get(cores, Machine(data["machine"], data["settings"], {}, {}))
        tables = {name: {r: dict(c) for r, c in rows.items()} for name, rows in known.tables.items()}
        for name in ("large", "many", "disk"):
            for row, columns in data.get(name, {}).items():
                for count, times in columns.items():
                    into = tables.setdefault(name, {}).setdefault(row, {})
                    into[count] = [*into.get(count, []), *times]
        found[cores] = Machine(known.facts, known.settings, tables, known.limits)
    return [found[cores] for cores in sorted(found)]


# -- verdicts ------------------------------------------------------------------------------------------


def ratios(machine: Machine) -> Iterator[tuple[str, float | None, float, bool]]:
    """(what, ratio, bound, whether it is a lower one)."""

    def seconds(row: str, count: int = machine.cores, table: str = "large") -> float | None:
        return machine.median(table, row, count)

    def ratio(first: float | None, *second: float | None) -> float | None:
        return first / sum(s for s in second if s) if first and all(second) else None

    if machine.cores == 2:
        yield (
            "`ptbin` / (`cp`, `sync` of the copy, `sha256sum`)",
            ratio(seconds(PROVEN), seconds(SYNCED), seconds(SHA)),
            0.45,
            False,
        )
        what = "`ptbin --verify none` / (`cp`, `sync` of the copy, Python's start)"
        yield what, ratio(seconds(UNPROVEN), seconds(SYNCED), seconds(START)), 1.2, False
        return
    for n in [4, machine.cores]:
        proven = seconds(PROVEN, n)
        yield f"{n} cores: `ptbin` / `sha256sum` of its output", ratio(proven, seconds(SHA)), 1.1, False
        yield (
            f"{n} cores: `ptbin` / (`cp` + `sha256sum`)",
            ratio(proven, seconds(CP), seconds(SHA)),
            0.75,
            False,
        )
        yield f"{n} cores: `ptbin` / the script", ratio(proven, seconds(SCRIPT)), 1.0, False
        what = f"{n} cores: `ptbin --file-digest none` / `cp`"
        yield what, ratio(seconds(NO_DIGEST, n), seconds(CP)), 1.3, False
        yield f"{n} cores: `ptbin --verify none` / `cp`", ratio(seconds(UNPROVEN, n), seconds(CP)), 1.0, False
    at_once = machine.cores
    inside = f"{THREADS}, without Python's start"
    for name, row in (("", THREADS), (", without Python's start", inside)):
        found = ratio(seconds(XARGS, at_once, "many"), seconds(row, at_once, "many"))
        yield f"{at_once} at once{name}: bytes per second / `xargs -P{at_once}`", found, 0.6, True
    threads, processes = (seconds(row, at_once, "many") for row in (THREADS, PROCESSES))
    yield f"{at_once} at once: threads / processes", ratio(threads, processes), 1.25, False


def verdict_table(machine: Machine) -> Iterator[str]:
    yield "| figure | found | bound | kept |"
    yield "|---|---|---|---|"
    for what, found, bound, lower in ratios(machine):
        if found is not None:
            kept = found >= bound if lower else found <= bound
            words = "at least" if lower else "at most"
            yield f"| {what} | {found:.2f} | {words} {bound:.2f} | {'yes' if kept else '**no**'} |"


# -- tables --------------------------------------------------------------------------------------------


def table(machine: Machine, name: str, title: str, counted: str, nbytes: float) -> Iterator[str]:
    rows = machine.tables.get(name, {})
    counts = sorted({int(count) for columns in rows.values() for count in columns})
    if not rows:
        return
    yield f"| {title} | " + " | ".join(f"{n} {counted}" for n in counts) + " |"
    yield "|---|" + "---:|" * len(counts)
    for row, columns in rows.items():
        cells = []
        for n in counts:
            times = columns.get(str(n))
            if not times:
                cells.append("")
                continue
            median = statistics.median(times)
            spread = f" ({min(times):.2f} to {max(times):.2f})" if len(times) > 1 else ""
            rate = "" if row == START else f", {nbytes / 1e6 / median:,.0f} MB/s"
            cells.append(f"{median:.2f} s{spread}{rate}")
        yield f"| {row} | " + " | ".join(cells) + " |"
    yield ""


def page(machines: Sequence[Machine], plot: str, note: str = "") -> str:
    lines = [HEAD, *([note] if note else []), f"![bytes per second by cores]({plot})", ""]
    for machine in machines:
        facts, settings = machine.facts, machine.settings
        sha = "with" if facts["sha_extensions"] else "without"
        lines += [
            f"## {machine.cores} cores",
            "",
            f"{facts['processor']}, {sha} SHA extensions, {facts['memory_gib']:.0f} GiB.",
            f"Linux {facts['kernel']}, Python {facts['python']}.",
            "",
            *verdict_table(machine),
            "",
        ]
        gib, mib, count = settings["large_gib"], settings["small_mib"], settings["small_count"]
        lines += table(
            machine, "large", f"one checkpoint, {gib:g} GiB of weights, tmpfs", "cores", gib * (1 << 30)
        )
        if settings["disk_gib"]:
            gib = settings["disk_gib"]
            lines += table(
                machine, "disk", f"one checkpoint, {gib:g} GiB of weights, disk", "cores", gib * (1 << 30)
            )
        title = f"{count} checkpoints of {mib} MiB of weights, tmpfs"
        lines += table(machine, "many", title, "at once", count * mib * (1 << 20))
        if machine.limits:
            counts = sorted({int(n) for rates in machine.limits.values() for n in rates})
            lines.append(
                "| what the machine can do, GB/s | " + " | ".join(f"{n} threads" for n in counts) + " |"
            )
            lines.append("|---|" + "---:|" * len(counts))
            for what, rates in machine.limits.items():
                cells = [f"{rates[str(n)]:.2f}" if str(n) in rates else "" for n in counts]
                lines.append(f"| {what} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


# -- the plot ------------------------------------------------------------------------------------------

PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP = 430, 260, 70, 60
COLOURS = {PROVEN: "#0969da", NO_DIGEST: "#1a7f37", UNPROVEN: "#8250df", SHA: "#9a6700", CP: "#6e7781"}
LINES = (("large", (PROVEN, NO_DIGEST, SHA, CP)), ("many", (THREADS, PROCESSES, XARGS)))
MANY_COLOURS = {THREADS: COLOURS[PROVEN], PROCESSES: COLOURS[NO_DIGEST], XARGS: COLOURS[CP]}
PANEL_TITLES = {
    "large": "one large checkpoint: MB/s by cores",
    "many": "32 small ones: MB/s by how many at once",
}


def draw(machine: Machine) -> str:
    """Two panels: one large checkpoint by cores, many by how many are at work at once."""
    width = 2 * (PANEL_WIDTH + LEFT) + 40
    height = TOP + PANEL_HEIGHT + 130
    drawn: list[str] = []
    sizes = {
        "large": machine.settings["large_gib"] * (1 << 30),
        "many": machine.settings["small_count"] * machine.settings["small_mib"] * (1 << 20),
    }
    for number, (name, rows) in enumerate(LINES):
        x0 = LEFT + number * (PANEL_WIDTH + LEFT)
        points: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            for count in sorted(map(int, machine.tables.get(name, {}).get(row, {}))):
                median = machine.median(name, row, count)
                assert median is not None
                points.setdefault(row, []).append((count, sizes[name] / 1e6 / median))
        drawn += _panel(x0, PANEL_TITLES[name], points, machine.cores, COLOURS | MANY_COLOURS)
    ground = f'<rect class="ground" width="{width}" height="{height}" rx="6"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
    return "\n".join([head, f"<style>{STYLE}</style>", ground, *drawn, "</svg>", ""])


def _panel(
    x0: int, title: str, points: Mapping[str, list[tuple[int, float]]], cores: int, colours: Mapping[str, str]
) -> Iterator[str]:
    most = max((rate for line in points.values() for _, rate in line), default=1.0) * 1.05
    steps = max(1, cores.bit_length() - 1)

    def x(count: int) -> float:
        return x0 + PANEL_WIDTH * (count.bit_length() - 1) / steps

    def y(rate: float) -> float:
        return TOP + PANEL_HEIGHT * (1 - rate / most)

    yield f'<text class="heading" x="{x0}" y="{TOP - 24}">{escape(title)}</text>'
    for share in (0, 0.25, 0.5, 0.75, 1):
        level = y(most * share)
        yield f'<line x1="{x0}" x2="{x0 + PANEL_WIDTH}" y1="{level:.0f}" y2="{level:.0f}" stroke="#8886"/>'
        yield f'<text x="{x0 - 8}" y="{level + 4:.0f}" text-anchor="end">{most * share:,.0f}</text>'
    for step in range(steps + 1):
        at = x(1 << step)
        yield f'<text x="{at:.0f}" y="{TOP + PANEL_HEIGHT + 20}" text-anchor="middle">{1 << step}</text>'
    for number, (row, line) in enumerate(points.items()):
        if len(line) == 1:  # a peer on one core: as fast on many
            line = [(1, line[0][1]), (cores, line[0][1])]
        dash = "" if row in (PROVEN, NO_DIGEST, THREADS, PROCESSES) else ' stroke-dasharray="5 4"'
        path = " ".join(f"{x(count):.1f},{y(rate):.1f}" for count, rate in line)
        yield f'<polyline points="{path}" fill="none" stroke="{colours[row]}" stroke-width="2"{dash}/>'
        below = TOP + PANEL_HEIGHT + 46 + 20 * number
        style = f'stroke="{colours[row]}" stroke-width="2"{dash}'
        yield f'<line x1="{x0}" x2="{x0 + 26}" y1="{below - 4}" y2="{below - 4}" {style}/>'
        yield f'<text x="{x0 + 34}" y="{below}">{escape(row)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("found", type=Path, nargs="+")
    parser.add_argument("--note", type=Path, help="a file of Markdown to go under the head")
    options = parser.parse_args()
    machines = read(options.found)
    plot = options.page.with_suffix(".svg")
    options.page.write_text(page(machines, plot.name, options.note.read_text() if options.note else ""))
    plot.write_text(draw(machines[-1]))


if __name__ == "__main__":
    main()
