"""Mirrors: what goes along, and what a second run does. What they delete: `test_sync_deleting`.

On files; on S3 as well (`ON_BOTH`) where more of a store is asked than what the contract of stores holds
(`tests/contract`): marks of the content, deleting, copies inside the store, the two sides' options.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.mirrors import COMPANIONS, ON_BOTH, OUTPUTS, Mirror, mirror
from tests.servers.fixtures import moto_s3

__all__ = ["mirror", "moto_s3"]

pytestmark = pytest.mark.usefixtures("server")


@ON_BOTH
def test_a_mirror_has_weights_and_companions_and_the_second_run_does_nothing(mirror: Mirror) -> None:
    assert mirror.sync() == {"converted": 2, "copied": 3}
    assert mirror.files() == OUTPUTS | COMPANIONS
    assert mirror.read("bert/config.json") == b'{"layers": 2}'
    assert mirror.sync() == {"up_to_date": 5}
    assert mirror.summary["written_bytes"] == 0


def test_configurations_say_what_the_cast_weights_are(mirror: Mirror) -> None:
    mirror.put("bert/config.json", b'{"layers": 2, "torch_dtype": "float32"}')
    assert mirror.sync(dtype="float16") == {"converted": 2, "copied": 3}
    assert mirror.read("bert/config.json") == b'{"layers": 2, "torch_dtype": "float16"}'
    record = json.loads(mirror.read(f"_ptbin/runs/{mirror.summary['run_id']}/run.json"))
    told = {entry["path"]: entry["detail"] for entry in record["checkpoints"] if "detail" in entry}
    assert told == {"bert/config.json": "changed: its element type is float16 now"}
    assert mirror.sync(dtype="float16") == {"up_to_date": 5}
    mirror.forget()
    assert mirror.sync(dtype="float16") == {"up_to_date": 5}
    assert mirror.sync(dtype="float16", checksum=True) == {"up_to_date": 5}
    assert mirror.sync() == {"converted": 2, "copied": 1, "up_to_date": 2}
    assert mirror.read("bert/config.json") == b'{"layers": 2, "torch_dtype": "float32"}'


def test_include_adds_files_and_exclude_takes_away(mirror: Mirror) -> None:
    assert mirror.sync(include=["**/*.png"], exclude=["bert/**"]) == {"converted": 1, "copied": 2}
    assert mirror.files() == {
        "gpt/last.bin", "gpt/last.bin.manifest.json", "gpt/README.md", "gpt/figures/loss.png",
    }  # fmt: skip


@ON_BOTH
def test_what_changed_goes_again(mirror: Mirror) -> None:
    mirror.sync()
    time.sleep(0.01)
    mirror.put("bert/config.json", b'{"layers": 3}')  # of the same size
    mirror.put("gpt/last.ckpt", mirror.blank[:])
    counts = mirror.sync()
    assert counts["copied"] == 1
    assert mirror.read("bert/config.json") == b'{"layers": 3}'


def test_checksum_passes_over_what_was_only_touched(mirror: Mirror) -> None:
    mirror.sync()
    for path in Path(mirror.root, "source").rglob("*.*"):
        os.utime(path, (1, 1))
    assert mirror.sync(checksum=True) == {"up_to_date": 5}
    assert mirror.sync() == {"up_to_date": 5}  # the new times are known from now on


def test_checksum_finds_what_changed_behind_its_time_and_size(mirror: Mirror) -> None:
    mirror.sync()
    for name, old, new in (("gpt/README.md", b"gpt", b"GPT"), ("bert/step1.pt", b"\0\0\x80?", b"\0\0\0@")):
        path = Path(mirror.root, "source", name)
        status = path.stat()
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new, 1))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert mirror.sync() == {"up_to_date": 5}
    counts = mirror.sync(checksum=True)
    # The damage of the weights is seen by the archive's own CRC-32: they are refused, the old ones stay.
    assert counts == {"copied": 1, "up_to_date": 3, "rejected": 1}
    assert mirror.reasons() == ["checksum_mismatch"]
    assert mirror.read("gpt/README.md") == b"# GPT"


@pytest.mark.parametrize("mirror", ["s3"], indirect=True)
def test_large_files_are_copied_by_the_store_itself(mirror: Mirror) -> None:
    mirror.put("gpt/vocabulary.json", b"x" * (12 << 20))
    mirror.sync()
    assert mirror.read("gpt/vocabulary.json") == b"x" * (12 << 20)
    assert mirror.summary["copied_bytes"] >= 8 << 20
