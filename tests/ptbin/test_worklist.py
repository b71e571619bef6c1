"""The index of finished work spares requests and is never believed against what lies there."""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin.catalog.finished import FinishedRow, read_finished, row_of, write_segment
from ptbin.catalog.request import RunRequest
from ptbin.catalog.worklist import WorkList
from ptbin.options import ConvertOptions
from ptbin.stores import identity_text, place_of
from ptbin.stores.local import LocalStore
from tests.fakes import CountingStore, registered

OPTIONS = ConvertOptions()
COUNT = 6


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class World:
    """Six checkpoints in two folders, converted, with an index of that."""

    def __init__(self, folder: Path) -> None:
        self.source, self.dest = folder / "in", folder / "out"
        torch.save({"state_dict": {"w": torch.arange(8.0)}}, folder / "x.pt")
        for number in range(COUNT):
            path = self.source / f"run{number % 2}" / f"{number}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((folder / "x.pt").read_bytes())
        with self.planned() as work:
            rows = [self.convert(work, job) for job in work.iter_to_do()]
        write_segment(place_of(self.dest), "first", rows)

    @contextlib.contextmanager
    def planned(self, options: ConvertOptions = OPTIONS, prefix: str = "") -> Iterator[WorkList]:
        dest = f"{prefix}{self.dest}"
        with contextlib.closing(WorkList(dest)) as work:
            assert work.plan(RunRequest(str(self.source), dest, options)) == []
            yield work

    def convert(self, work: WorkList, job: ptbin.catalog.Job) -> FinishedRow:
        published = ptbin.publish(ptbin.stage(job.source_uri, job.dest_uri))
        row = row_of(published.manifest, work.relative_manifest(job), identity_text(published.identity))
        assert row is not None
        return row

    @property
    def segment(self) -> Path:
        (found,) = (self.dest / "_ptbin" / "index").iterdir()
        return found

    def states(self, options: ConvertOptions = OPTIONS) -> tuple[int, int, int]:
        """How many are up to date, to be asked, to be converted."""
        with self.planned(options) as work:
            return work.count_current(), work.count_to_ask(), work.to_do()[0]


def test_what_is_finished_is_known_without_a_read_each(world: World) -> None:
    with registered("counting", CountingStore(LocalStore())) as store:
        with world.planned(prefix="counting://") as work:
            assert work.count_current() == COUNT
        assert store.count("open") == 1  # the segment
        assert store.count("stat") == 0
        assert store.count("list") == 1


def test_a_lost_index_costs_a_read_each_and_is_made_again(world: World) -> None:
    world.segment.unlink()
    assert world.states() == (0, COUNT, 0)
    with world.planned() as work:
        jobs = list(work.iter_to_ask())
        rows = [read_finished(job, work.relative_manifest(job)) for job in jobs]
        kept = work.answer(jobs, [row for row in rows if row is not None], OPTIONS)
        assert (work.count_current(), work.count_to_ask()) == (COUNT, 0)
    write_segment(place_of(world.dest), "again", kept)
    assert world.states() == (COUNT, 0, 0)


def test_a_manifest_that_is_another_now_is_asked(world: World) -> None:
    manifest = world.dest / "run0" / "0.bin.manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert world.states() == (COUNT - 1, 1, 0)


@pytest.mark.parametrize("change", ["output gone", "output resized", "manifest gone", "source changed"])
def test_what_is_not_as_it_was_is_converted_again(world: World, change: str) -> None:
    output = world.dest / "run1" / "1.bin"
    if change == "output gone":
        output.unlink()
    elif change == "output resized":
        output.write_bytes(b"x")
    elif change == "manifest gone":
        output.with_name("1.bin.manifest.json").unlink()
    else:
        torch.save({"w": torch.ones(3)}, world.source / "run1" / "1.pt")
    with world.planned() as work:
        assert (work.count_current(), work.count_to_ask()) == (COUNT - 1, 0)
        assert [job.path for job in work.iter_to_do()] == ["run1/1.pt"]


def test_other_options_and_a_stronger_proof_are_other_work(world: World) -> None:
    assert world.states(replace(OPTIONS, format="safetensors"))[0] == 0
    assert world.states(replace(OPTIONS, drop=("b",)))[0] == 0
    assert world.states(replace(OPTIONS, verify="load")) == (0, 0, COUNT)
    assert world.states(replace(OPTIONS, verify="none")) == (COUNT, 0, 0)
    assert world.states(replace(OPTIONS, force=True)) == (0, 0, COUNT)


def _rows(world: World) -> list[Any]:
    return [json.loads(line) for line in gzip.decompress(world.segment.read_bytes()).splitlines()]


DAMAGE = {
    "cut": lambda data, rows: data[: len(data) // 2],
    "empty": lambda data, rows: b"",
    "no gzip": lambda data, rows: b"x" * 1000,
    "no rows": lambda data, rows: gzip.compress(b'{}\n[]\nnull\n[1,2,3,4,5]\n["a","b","c","d"]\n' * 9),
    "no end of line": lambda data, rows: gzip.compress(b"[" * (3 << 20)),
    "deep": lambda data, rows: gzip.compress(b"[" * 100_000 + b"\n"),
    "other places": lambda data, rows: gzip.compress(
        "".join(json.dumps([f"../{row[0]}", *row[1:]]) + "\n" for row in rows).encode()
    ),
    "other outputs": lambda data, rows: gzip.compress(
        "".join(json.dumps([*row[:4], ["../../../etc/passwd", 10]]) + "\n" for row in rows).encode()
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_index_never_makes_work_look_done(world: World, damage: str) -> None:
    (world.dest / "run0" / "0.bin").write_bytes(b"not what it was")
    world.segment.write_bytes(DAMAGE[damage](world.segment.read_bytes(), _rows(world)))
    with world.planned() as work:
        jobs = list(work.iter_to_ask())
        rows = [read_finished(job, work.relative_manifest(job)) for job in jobs]
        work.answer(jobs, [row for row in rows if row is not None], OPTIONS)
        left = {job.path for job in work.iter_to_do()}
        assert "run0/0.pt" in left
        assert damage == "other outputs" or left == {"run0/0.pt"}


def test_a_row_for_another_state_of_a_manifest_is_not_believed(world: World) -> None:
    rows = [json.dumps([row[0], "mtime:1-1", *row[2:]]) for row in _rows(world)]
    world.segment.write_bytes(gzip.compress("\n".join(rows).encode() + b"\n"))
    assert world.states() == (0, COUNT, 0)


def test_a_copy_that_an_early_index_knows_is_compared_once_more(tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(b"{}")
    dest = str(tmp_path / "out")

    def states() -> tuple[int, int]:
        with contextlib.closing(WorkList(dest)) as work:
            work.plan(RunRequest(str(tmp_path / "in"), dest, OPTIONS, "sync"))
            return work.count_current(), work.count_to_ask()

    with contextlib.closing(WorkList(dest)) as work:
        work.plan(RunRequest(str(tmp_path / "in"), dest, OPTIONS, "sync"))
        (job,) = work.iter_to_ask()
        row = read_finished(job, work.relative_manifest(job))
    assert row is not None
    write_segment(place_of(dest), "first", [replace(row, source="")])
    assert states() == (0, 1)
    write_segment(place_of(dest), "second", [row])
    assert states() == (1, 0)


def test_work_comes_largest_first_and_collisions_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name, nbytes in {"a.pt": 10, "b.pt": 30, "c.pt": 20, "twin.pt": 5, "twin.ckpt": 6, "twin": 7}.items():
        (source / name).write_bytes(b"x" * nbytes)
    with contextlib.closing(WorkList(str(tmp_path / "out"))) as work:
        problems = work.plan(RunRequest(str(source), str(tmp_path / "out"), OPTIONS))
        assert [job.path for job in work.iter_to_do()] == ["b.pt", "c.pt", "a.pt"]
        assert work.to_do() == (3, 60)
    assert {problem.reason for problem in problems} == {"output_collision"}
    assert {Path(problem.source).name for problem in problems} == {"twin.pt", "twin.ckpt"}


HUGE = """
import json, sys
from ptbin.catalog.finished import FinishedRow, job_digest, write_segment
from ptbin.catalog.request import RunRequest
from ptbin.catalog.worklist import WorkList
from ptbin.options import ConvertOptions
from ptbin.stores import place_of
from ptbin.stores import Identity, ListedObject, register_store
from ptbin.stores.local import LocalStore

count, folder = int(sys.argv[1]), sys.argv[2]
etag = "0123456789abcdef0123456789abcdef"

def names():
    for number in range(count):
        yield f"team{number // 20000}/run{number // 50:05}/step{number % 50:03}"

class Source(LocalStore):
    def is_directory(self, path): return True
    def iter_objects(self, path, watch=None):
        for name in names():
            yield ListedObject(name + ".ckpt", f"src://x/{name}.ckpt", 1000, Identity("etag", etag))

class Dest(LocalStore):
    def iter_objects(self, path, watch=None):
        yield from (ListedObject(item.path, item.uri, item.size, item.identity)
                    for item in LocalStore.iter_objects(self, path))
        for name in names():
            yield ListedObject(name + ".bin", "", 900, Identity("etag", etag))
            yield ListedObject(name + ".bin.manifest.json", "", 90, Identity("etag", etag))

register_store("src", lambda uri, options: (Source(), uri.removeprefix("src://")))
register_store("dst", lambda uri, options: (Dest(), uri.removeprefix("dst://")))
options = ConvertOptions()
identity = {"kind": "etag", "value": etag}

def rows():
    for name in names():
        digest = job_digest(f"src://x/{name}.ckpt", 1000, identity, options.fingerprint())
        output = ((name.rpartition("/")[2] + ".bin", 900),)
        yield FinishedRow(f"{name}.bin.manifest.json", f"etag:{etag}", digest, "checksum", output)

write_segment(place_of(folder), "all", rows())
work = WorkList(f"dst://{folder}")
problems = work.plan(RunRequest("src://x", f"dst://{folder}", options))
assert not problems
# Not getrusage's, which begins with the peak of the process that started this one.
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps([work.count_current(), work.to_do()[0], int(peak)]))
"""


@pytest.mark.starts_processes
def test_memory_stays_flat_however_many_there_are(tmp_path: Path) -> None:
    """Both listings, the index, and the answer for each: 20,000 and 100,000 checkpoints."""
    peaks = []
    for count in (20_000, 100_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", HUGE, str(count), str(folder)], capture_output=True, text=True, check=True
        )
        current, to_do, peak_kib = json.loads(done.stdout)
        assert (current, to_do) == (count, 0)
        peaks.append(peak_kib / 1024)
    assert peaks[1] < 150
    assert peaks[1] - peaks[0] < 12
