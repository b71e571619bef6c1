"""`make bench`, S3's part: conversions to, from and inside a real S3 server, and what peers take.

    python benchmarks/s3.py [--quick] [--only a,b,c,d] [--mib 2970] [--rounds 4] [--peers .peers]

    a   S3 to S3, inside one store        b   S3 to local
    c   local to S3                       d   all three through a proxy that injects faults

Starts Ceph's gateway on loopback and uploads one checkpoint with Adam state. Whole processes in turns; the
first run of each goes through a relay that counts its bytes and is not measured, the others talk to the
server. Client and server share the machine's cores. At full size it needs 12 GB of disk below --work-dir and
16 GB of memory: the server holds everything twice. Peers that are not installed are left out, with a note.
Exits 1 if a threshold was missed. Report and plot are written only at full size with all groups.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from processes import Command, Measured, measure_in_turns, run_once
from run import HERE, MIB

# For `tests`, behind the installed packages: ptbin itself is measured, and imported, as it is installed.
sys.path.append(str(HERE.parent))
from s3_bench import (
    AS_MANY_BYTES_URI,
    OUTPUT_FOLDER_URI,
    OUTPUT_URI,
    SOURCE_URI,
    Bench,
    Build,
    digest_of_file,
    say,
)
from s3_report import FaultRun, Group, Results, Row, plot, report, verdicts

from tests.servers.rados_gateway import RadosGateway, missing_programs
from tests.servers.random_faults import Faults, RandomFaults, random_faults

FULL_MIB = 2970
"""A checkpoint of 2.9 GiB."""
QUICK_MIB = 192
CAPACITY_NBYTES = 14 << 30

PART_COPY_NBYTES = 64 * MIB
PART_COPY_CONCURRENCY = 8
"""Of the bare UploadPartCopy: as ptbin sets them for itself."""

FAULTS = Faults(p503=0.05, cut=0.02, spike=0.01, spike_s=0.5)
FAULTY_VERIFY = "none"
"""So that nothing but the transfer itself can set right what the faults did."""


def _copiers(bench: Bench, source: str, dest: str) -> dict[str, Build]:
    """`aws s3 cp` and rclone with their own defaults."""
    builds: dict[str, Build] = {}
    if aws := bench.program("aws"):
        builds["aws s3 cp"] = bench.peer([aws, "s3", "cp", source, dest, "--no-progress"], dest)
    if rclone := bench.program("rclone"):
        ends = [end.replace("s3://", "bench:", 1) for end in (source, dest)]
        # rclone refuses to start where a bundle of certificates is set; boto3 where it is set to nothing
        builds["rclone copyto"] = bench.peer([rclone, "copyto", *ends], dest, AWS_CA_BUNDLE="")
    return builds


def _s3_to_s3(bench: Bench) -> tuple[dict[str, Build], dict[str, Build]]:
    sizes = [str(bench.output_nbytes), str(PART_COPY_NBYTES), str(PART_COPY_CONCURRENCY)]
    close = {
        "ptbin --verify none": bench.ptbin(SOURCE_URI, OUTPUT_URI, "--verify", "none"),
        "ptbin": bench.ptbin(SOURCE_URI, OUTPUT_URI),
        "bare UploadPartCopy": bench.script("part_copy.py", SOURCE_URI, OUTPUT_URI, *sizes),
    }
    far = {
        "torch.load + torch.save": bench.script("torch_script.py", SOURCE_URI, OUTPUT_URI),
        "torch.load(mmap=True) + torch.save": bench.script("torch_script.py", SOURCE_URI, OUTPUT_URI, "mmap"),
    }
    if importlib.util.find_spec("huggingface_hub") is not None:
        far["huggingface_hub"] = bench.script("hub_script.py", SOURCE_URI, OUTPUT_FOLDER_URI)
    else:
        bench.note("huggingface_hub is not installed here")
    mergekit = bench.peers / "mergekit"
    if (mergekit / "mergekit").exists() or importlib.util.find_spec("mergekit") is not None:
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(mergekit))))
        far["mergekit's lazy loader"] = bench.script(
            "mergekit_script.py", SOURCE_URI, OUTPUT_FOLDER_URI, PYTHONPATH=path
        )
    else:
        bench.note("mergekit is not installed here")
    return close, far


def _s3_to_local(bench: Bench) -> tuple[dict[str, Build], dict[str, Build]]:
    dest = str(bench.output)
    close = {
        "ptbin --verify none": bench.ptbin(SOURCE_URI, dest, "--verify", "none"),
        "ptbin": bench.ptbin(SOURCE_URI, dest),
        **_copiers(bench, AS_MANY_BYTES_URI, dest),
    }
    return close, {"torch.load + torch.save": bench.script("torch_script.py", SOURCE_URI, dest)}


def _local_to_s3(bench: Bench) -> tuple[dict[str, Build], dict[str, Build]]:
    source = str(bench.source)
    close = {
        "ptbin --verify none": bench.ptbin(source, OUTPUT_URI, "--verify", "none"),
        "ptbin": bench.ptbin(source, OUTPUT_URI),
        **_copiers(bench, str(bench.reference), OUTPUT_URI),
    }
    return close, {"torch.load + torch.save": bench.script("torch_script.py", source, OUTPUT_URI)}


def _measure(bench: Bench, title: str, close: Mapping[str, Build], far: Mapping[str, Build]) -> Group:
    """Each once through a counting relay, then in turns: `close` in twice as many rounds, less one."""
    say(title)
    log = bench.work / "log"
    counted: dict[str, tuple[int, int]] = {}
    with random_faults(bench.url) as relay:
        for name, build in {**close, **far}.items():
            command = build(relay.url)
            before = replace(relay.counts)
            run_once(command, log)
            came = relay.counts - before
            counted[name] = (came.bytes_to_clients, came.bytes_from_clients)
            if name.startswith("ptbin"):
                made = digest_of_file(bench.output) if command.output else bench.digest_of_object()
                if made != bench.expected:
                    raise RuntimeError(f"{title}: {name} made other bytes than from local to local")
    measured: dict[str, Measured] = {}
    for builds, rounds in ((close, 2 * bench.rounds - 1), (far, bench.rounds)):
        commands = {name: build(bench.url) for name, build in builds.items()}
        measured |= measure_in_turns(commands, rounds=rounds, log=log, say=say, warm_up=False)
    bench.output.unlink(missing_ok=True)
    return Group(title, {name: Row(runs, *counted[name]) for name, runs in measured.items()})


def _with_faults(bench: Bench) -> dict[str, FaultRun]:
    """Each route through a proxy that injects faults, and through the same proxy without them, in turns."""
    output = str(bench.output)
    routes = {
        "S3 to S3": (SOURCE_URI, OUTPUT_URI),
        "S3 to local": (SOURCE_URI, output),
        "local to S3": (str(bench.source), OUTPUT_URI),
    }
    found: dict[str, FaultRun] = {}
    for seed, (route, (source, dest)) in enumerate(routes.items(), start=1):
        say(f"{route} through the proxy")
        faults = Faults(seed, FAULTS.p503, FAULTS.cut, FAULTS.spike, FAULTS.spike_s)
        with random_faults(bench.url) as calm, random_faults(bench.url, faults) as proxy:
            found[route] = _one_route(
                bench, bench.ptbin(source, dest, "--verify", FAULTY_VERIFY), calm, proxy
            )
    bench.output.unlink(missing_ok=True)
    return found


def _one_route(bench: Bench, build: Build, calm: RandomFaults, proxy: RandomFaults) -> FaultRun:
    log = bench.work / "log"
    bench.clear()
    wrong: list[str] = []
    orphans: list[str] = []

    def look() -> None:
        # Where the answer to its beginning was lost, the next run into that folder discards it.
        unheard = sum(
            what.startswith("answer cut: POST") and what.endswith("?uploads") for what in proxy.struck
        )
        if left := [key for key, _ in bench.open_uploads()][unheard:]:
            orphans.extend(left)
            say(f"left behind: uploads of {', '.join(left)}; faults so far:\n  " + "\n  ".join(proxy.struck))
        try:
            made = digest_of_file(bench.output) if local else bench.digest_of_object()
        except (OSError, bench.client.exceptions.NoSuchKey):
            made = "nothing"
        if made != bench.expected:
            wrong.append(log.read_text(errors="replace")[-2000:])
            say(f"not converted correctly: {wrong[-1]}")

    commands = {}
    for name, url in (("without faults", calm.url), ("with faults", proxy.url)):
        command = build(url)
        local = command.output is not None
        commands[name] = Command(command.argv, command.output, None, before=command.before, after=look)
    measured = measure_in_turns(commands, rounds=2 * bench.rounds - 1, log=log, say=say)
    return FaultRun(
        measured["without faults"], measured["with faults"], proxy.counts, tuple(wrong), tuple(orphans)
    )


GROUPS: dict[str, tuple[str, Callable[[Bench], tuple[dict[str, Build], dict[str, Build]]]]] = {
    "a": ("S3 to S3, inside one store", _s3_to_s3),
    "b": ("S3 to local", _s3_to_local),
    "c": ("local to S3", _local_to_s3),
}


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work-dir", type=Path, help="where the files go; default: a temporary folder")
    parser.add_argument("--mib", type=int, help=f"size of the checkpoint; default {FULL_MIB}")
    parser.add_argument(
        "--rounds", type=int, help="of the slow peers; default 4; others: twice that, less one"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MIB} MiB, one round, no report")
    parser.add_argument("--only", default="a,b,c,d", help="groups to measure, such as a,d")
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".peers", help="see `make bench-peers`")
    parser.add_argument("--report", type=Path, default=HERE.parent / "docs" / "benchmarks-s3.md")
    parser.add_argument("--report-anyway", action="store_true", help="write it whatever was measured")
    wishes = parser.parse_args(arguments)
    wishes.mib = wishes.mib or (QUICK_MIB if wishes.quick else FULL_MIB)
    wishes.rounds = wishes.rounds or (1 if wishes.quick else 4)
    wishes.only = wishes.only.split(",")
    if unknown := set(wishes.only) - {*GROUPS, "d"}:
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    return wishes


def main(arguments: Sequence[str] | None = None) -> int:
    wishes = _arguments(arguments)
    if missing := missing_programs():
        say(f"left out: no {', '.join(missing)} here (apt-get install ceph-mon ceph-osd radosgw)")
        return 0
    if wishes.work_dir:
        wishes.work_dir.mkdir(parents=True, exist_ok=True)
    gateway = RadosGateway(capacity_nbytes=CAPACITY_NBYTES, gc_wait_s=1)
    endpoint = gateway.start()
    try:
        with tempfile.TemporaryDirectory(prefix="ptbin-bench-", dir=wishes.work_dir) as folder:
            bench = Bench(
                Path(folder),
                gateway,
                endpoint.url,
                endpoint.key,
                endpoint.secret,
                wishes.peers,
                wishes.rounds,
            )
            bench.set_up(wishes.mib)
            groups = {
                key: _measure(bench, title, *builds(bench))
                for key, (title, builds) in GROUPS.items()
                if key in wishes.only
            }
            faults = _with_faults(bench) if "d" in wishes.only else {}
            sizes = bench.source.stat().st_size, bench.output_nbytes
    finally:
        gateway.stop()
    results = Results(*sizes, wishes.rounds, groups, faults, bench.notes)
    text = report(results, f"{wishes.report.stem}.svg")
    print(text)
    everything = wishes.mib >= FULL_MIB and not {*GROUPS, "d"} - set(wishes.only)
    if everything or wishes.report_anyway:
        wishes.report.write_text(text, encoding="utf-8")
        wishes.report.with_suffix(".svg").write_text(plot(results), encoding="utf-8")
        say(f"written: {wishes.report}")
    return 0 if all(verdict.kept for verdict in verdicts(results)) else 1


if __name__ == "__main__":
    sys.exit(main())
