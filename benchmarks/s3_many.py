"""Many small files into S3: what ptbin takes for each checkpoint and each companion, beside rclone's copy.

    python benchmarks/s3_many.py [--count 2000] [--rounds 3] [--work-dir DIR]

Ceph's gateway on loopback; client and server share the cores. Whole processes in turns. Those of ptbin start
a Prefect server, which takes seconds whatever the number of files: so each is run with `count` files and with
a tenth of them, and the difference is what the further files took. Checkpoints of some 12 kB, companions of
2 kB. Requests are counted in the tests (tests/stores), not here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from processes import Command, measure_in_turns
from run import PTBIN, PYTHON
from s3_bench import BUCKET, OUTPUT_FOLDER_URI, OUTPUT_PREFIX, Bench, say

from tests.servers.rados_gateway import RadosGateway, missing_programs

WORKERS = 8
MAKE = """
import sys, torch
from pathlib import Path
kind, count, root = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
for number in range(count):
    path = root / f"run{number % 10}" / f"step{number:05}.{'ckpt' if kind == 'checkpoints' else 'json'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "checkpoints":
        weights = {f"layer{k}.weight": torch.randn(16, 40) for k in range(4)}
        torch.save({"state_dict": weights, "step": number}, path)
    else:
        path.write_text('{"step": %d, "note": "%s"}' % (number, "x" * 2000))
if kind == "companions":
    torch.save({"weight": torch.ones(4)}, root / "one.pt")
"""


def _upload(bench: Bench, root: Path, prefix: str) -> None:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(root).as_posix()}"
            bench.client.upload_file(str(path), BUCKET, key)


def _clear(bench: Bench) -> None:
    """Every object below the outputs' folder, a thousand at a time."""
    client = bench.client
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=OUTPUT_PREFIX)
    for page in pages:
        if found := [{"Key": item["Key"]} for item in page.get("Contents", ())]:
            client.delete_objects(Bucket=BUCKET, Delete={"Objects": found, "Quiet": True})


def _commands(bench: Bench, counts: tuple[int, int]) -> dict[str, Command]:
    options = bench.options_file(bench.url)

    def ptbin(source: str) -> Command:
        argv = [PTBIN, "sync", source, OUTPUT_FOLDER_URI, "--workers", str(WORKERS), "--quiet"]
        argv += ["--dest-options", options]
        if source.startswith("s3://"):
            argv += ["--source-options", options]
        return Command(argv, before=lambda: _clear(bench))

    def rclone(program: str, source: Path) -> Command:
        argv = [program, "copy", str(source), f"bench:{BUCKET}/{OUTPUT_PREFIX}", "--transfers", str(WORKERS)]
        environment = bench.environment(bench.url) | {"AWS_CA_BUNDLE": ""}  # see s3.py
        return Command(argv, environment=environment, before=lambda: _clear(bench))

    found = {}
    for count in counts:
        for kind in ("checkpoints", "companions"):
            root = bench.work / f"{kind}{count}"
            subprocess.run([PYTHON, "-I", "-c", MAKE, kind, str(count), str(root)], check=True)
            found[f"ptbin, {kind} from local, {count}"] = ptbin(str(root))
            if program := bench.program("rclone"):
                found[f"rclone, {kind} from local, {count}"] = rclone(program, root)
            _upload(bench, root, f"{kind}{count}")
            found[f"ptbin, {kind} inside S3, {count}"] = ptbin(f"s3://{BUCKET}/{kind}{count}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path)
    wishes = parser.parse_args()
    if missing := missing_programs():
        say(f"left out: no {', '.join(missing)} here (apt-get install ceph-mon ceph-osd radosgw)")
        return 0
    few, many = wishes.count // 10, wishes.count
    gateway = RadosGateway(gc_wait_s=1)
    endpoint = gateway.start()
    try:
        with tempfile.TemporaryDirectory(prefix="ptbin-bench-", dir=wishes.work_dir) as folder:
            work = Path(folder)
            bench = Bench(work, gateway, endpoint.url, endpoint.key, endpoint.secret, work, wishes.rounds)
            bench.client.create_bucket(Bucket=BUCKET)
            commands = _commands(bench, (few, many))
            log = Path(folder) / "log"
            measured = measure_in_turns(commands, rounds=wishes.rounds, log=log, say=say, warm_up=False)
    finally:
        gateway.stop()
    print("| files | few | many | ms for each further file |\n|---|---:|---:|---:|")
    for name in (name.rpartition(", ")[0] for name in commands if name.endswith(f" {many}")):
        short, long = measured[f"{name}, {few}"], measured[f"{name}, {many}"]
        each = sorted((b - a) / (many - few) * 1000 for a in short.seconds for b in long.seconds)
        middle = each[len(each) // 2]
        print(
            f"| {name} | {short.median:.1f} s | {long.median:.1f} s "
            f"| {middle:.1f} ({each[0]:.1f} to {each[-1]:.1f}) |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
