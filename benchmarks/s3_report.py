"""What `s3.py` found, as verdicts, as a page of tables and as a plot. Measures nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from bars import Bar, BarGroup, draw
from processes import Measured
from run import MIB, Verdict

from tests.servers.random_faults import Counts

__all__ = ["FaultRun", "Group", "Results", "Row", "plot", "report", "verdicts"]

OURS = ("ptbin --verify none", "ptbin")
PLAIN = "torch.load + torch.save"
COPIERS = ("aws s3 cp", "rclone copyto")

BOUNDED = {"a": ("ptbin --verify none",), "b": OURS, "c": ("ptbin --verify none",)}
"""Which of ours the bounds on time and bytes hold for: where the proof reads the output back from the
store, it costs as much again, and no bound speaks of that."""


@dataclass(frozen=True)
class Row:
    """One command: its runs, and its bytes over the wire, to and from the client."""

    measured: Measured
    nbytes_in: int
    nbytes_out: int

    @property
    def median(self) -> float:
        return self.measured.median

    @property
    def nbytes(self) -> int:
        return self.nbytes_in + self.nbytes_out


@dataclass(frozen=True)
class Group:
    title: str
    rows: Mapping[str, Row]


@dataclass(frozen=True)
class FaultRun:
    """One route through the proxy: without and with faults; what came out wrong or was left behind."""

    calm: Measured
    faulty: Measured
    counts: Counts
    wrong: Sequence[str]
    orphans: Sequence[str]

    @property
    def ratio(self) -> float:
        return self.faulty.median / self.calm.median


@dataclass(frozen=True)
class Results:
    source_nbytes: int
    output_nbytes: int
    rounds: int
    groups: Mapping[str, Group]
    faults: Mapping[str, FaultRun]
    notes: Sequence[str]


def verdicts(results: Results) -> list[Verdict]:
    """The bounds on what was measured; a bound against peers that are absent is left out."""
    found: list[Verdict] = []
    for key, group in results.groups.items():
        for name in BOUNDED[key]:
            row = group.rows[name]
            found += _of_s3_to_s3(results, group, name) if key == "a" else []
            if key in {"b", "c"}:
                done, nbytes = ("read", row.nbytes_in) if key == "b" else ("sent", row.nbytes_out)
                what = f"{group.title}, `{name}`: bytes {done} / weights"
                found.append(Verdict(what, nbytes / results.output_nbytes, 1.01, "x"))
            copiers = [group.rows[peer].median for peer in COPIERS if peer in group.rows]
            if copiers:
                what = f"{group.title}, `{name}`: throughput / the better of `aws s3 cp` and `rclone`"
                found.append(Verdict(what, min(copiers) / row.median, 0.9, "x", at_least=True))
    ours = [group.rows[name].measured.peak for group in results.groups.values() for name in OURS]
    ours += [run.faulty.peak for run in results.faults.values()]
    found.append(Verdict("peak memory of ptbin, throughout", max(ours, default=0) / MIB, 250, "MiB"))
    for route, run in results.faults.items():
        found.append(Verdict(f"{route}: with faults / without", run.ratio, 2, "x"))
    if results.faults:
        runs = results.faults.values()
        found += [
            Verdict("conversions gone wrong under faults", sum(len(run.wrong) for run in runs), 0, ""),
            Verdict(
                "multipart uploads left behind that were heard of",
                sum(len(run.orphans) for run in runs),
                0,
                "",
            ),
        ]
    return found


def _of_s3_to_s3(results: Results, group: Group, name: str) -> list[Verdict]:
    row, title = group.rows[name], group.title
    bare, plain = group.rows["bare UploadPartCopy"], group.rows[PLAIN]
    return [
        *(
            Verdict(
                f"{title}, `{name}`: bytes {way} the client / weights",
                100 * n / results.output_nbytes,
                1,
                "%",
            )
            for way, n in (("to", row.nbytes_in), ("from", row.nbytes_out))
        ),
        Verdict(f"{title}, `{name}` / bare `UploadPartCopy`", row.median / bare.median, 1.3, "x"),
        Verdict(f"{title}, plain script / `{name}`", plain.median / row.median, 4, "x", at_least=True),
    ]


def report(results: Results, plot_name: str) -> str:
    """The page, with the plot beside it under that name."""
    source, output = (f"{n / (1 << 30):.2f} GiB" for n in (results.source_nbytes, results.output_nbytes))
    versions = [f"{name} {metadata.version(name).partition('+')[0]}" for name in ("torch", "boto3", "s3fs")]
    lines = [
        "# Benchmarks on S3",
        "",
        "Made by `make bench`; do not edit by hand. One checkpoint with Adam state of",
        f"{source}, {output} of it weights, on Ceph's gateway over loopback; client and server share",
        f"{os.cpu_count()} cores. Whole processes in turns, medians over {2 * results.rounds - 1} rounds",
        f"(those of torch, huggingface_hub and mergekit: {results.rounds}). Bytes were counted by a relay,",
        "in a run that was not measured. `aws s3 cp` and `rclone` move an object of the output's size, all",
        "others take the whole checkpoint and give its weights. `ptbin` alone means `--verify checksum`.",
        f"Python {platform.python_version()}, {', '.join(versions)}.",
        "",
        "| figure | found | bound | kept |",
        "|---|---|---|---|",
        *(verdict.row() for verdict in verdicts(results)),
        "",
        f"![Seconds and bytes over the wire of every process]({plot_name})",
    ]
    for group in results.groups.values():
        lines += [
            "",
            f"## {group.title}",
            "",
            "| process | median | fastest to slowest | peak memory | bytes to the client | from the client |",
            "|---|---:|---:|---:|---:|---:|",
            *(_row(name, row) for name, row in group.rows.items()),
        ]
    if results.faults:
        lines += [
            "",
            "## Through a proxy that injects faults",
            "",
            "5 % of requests answered 503, 2 % of connections reset in the middle of a body, 1 % of requests",
            "half a second late; against the same proxy without faults. `ptbin --verify none`. Requests and",
            "faults are those of all runs together.",
            "",
            "| route | no faults | faults | fastest to slowest | peak memory | requests | 503 | cut | late |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            *(_fault_row(route, run) for route, run in results.faults.items()),
        ]
    if results.notes:
        lines += ["", "Left out: " + "; ".join(results.notes) + "."]
    return "\n".join([*lines, ""])


def _row(name: str, row: Row) -> str:
    return (
        f"| {name} | {row.median:.2f} s | {_spread(row.measured)} | {row.measured.peak / MIB:.0f} MiB "
        f"| {_mib(row.nbytes_in)} | {_mib(row.nbytes_out)} |"
    )


def _fault_row(route: str, run: FaultRun) -> str:
    counts = run.counts
    cut = counts.cut_requests + counts.cut_answers
    return (
        f"| {route} | {run.calm.median:.2f} s | {run.faulty.median:.2f} s | {_spread(run.faulty)} "
        f"| {run.faulty.peak / MIB:.0f} MiB "
        f"| {counts.requests} | {counts.answered_503} | {cut} | {counts.spikes} |"
    )


def _spread(measured: Measured) -> str:
    return f"{min(measured.seconds):.2f} to {max(measured.seconds):.2f} s"


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.2f} MiB" if nbytes < 10 * MIB else f"{nbytes / MIB:.0f} MiB"


def plot(results: Results) -> str:
    """Seconds and bytes of every process."""
    groups = [
        BarGroup(
            group.title,
            [
                Bar(name, (row.median, row.nbytes / (1 << 30)), ours=name in OURS)
                for name, row in group.rows.items()
            ],
        )
        for group in results.groups.values()
    ]
    if results.faults:
        bars: list[Bar] = []
        for route, run in results.faults.items():
            bars.append(Bar(f"{route}, no faults", (run.calm.median, None)))
            bars.append(Bar(f"{route}, faults", (run.faulty.median, None), ours=True))
        groups.append(BarGroup("ptbin through a proxy that injects faults", bars))
    return draw(groups, ("seconds, median", "GiB over the wire, both ways"), ("{:.2f} s", "{:.3f} GiB"))
