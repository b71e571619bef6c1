"""Keys as S3 has them: each is converted, or reported; none is left out in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ptbin
from flows.convert import convert
from flows.sync import sync
from ptbin.runs.run_ids import new_run_id
from ptbin.stores import Place, place_of
from tasks.live import LiveRun, open_live_run
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import moto_s3

__all__ = ["moto_s3"]

pytestmark = [pytest.mark.usefixtures("server"), pytest.mark.starts_servers]

LONG_FOLDERS = "/".join(["folder-" + "x" * 91] * 9)
LONGEST = f"{LONG_FOLDERS}/{'x' * (1000 - len(LONG_FOLDERS) - 4)}.pt"
"""1,000 characters, in steps that a local file system takes as well."""
ONE_STEP = "y" * 997 + ".pt"
"""1,000 characters in one step, which no local file system takes."""

CONVERTED = [
    "plain.pt",
    "file.pt",
    "file.pt/inner.pt",
    "file.pt.bak/x.pt",
    "a b+c%20d.pt",
    "x?y=1&z#.pt",
    "[x]*.pt",
    "\u00fcn\u00ef.pt",
    LONGEST,
]
REPORTED = ["ends/with.pt/", "two//slashes.pt", "../up.pt", "./here.pt"]


def run(flow: Any, source: Place, dest: Place, options: dict[str, Any]) -> dict[str, Any]:
    with open_live_run(LiveRun(new_run_id(), options, {} if dest.is_local else options)) as live:
        flow(source.uri, dest.uri, run_id=live.run_id, return_state=True)
    return live.summary


@pytest.fixture
def bucket(moto_s3: S3Endpoint, checkpoint: Path) -> Place:
    bucket = place_of(f"s3://{moto_s3.make_bucket()}", moto_s3.storage_options)
    blank = checkpoint.read_bytes()
    client = moto_s3.store().client
    for key in (*CONVERTED, ONE_STEP, *REPORTED):
        where = {"Bucket": bucket.path, "Key": f"in/{key}"}
        client.call("put_object", key, **where, Body=bytearray(blank))
    return bucket


@pytest.mark.parametrize(("flow", "to"), [(convert, "s3"), (convert, "local"), (sync, "s3")])
def test_each_is_converted_or_reported(
    bucket: Place, moto_s3: S3Endpoint, checkpoint: Path, tmp_path: Path, flow: Any, to: str
) -> None:
    source = bucket / "in"
    dest = bucket / "out" if to == "s3" else place_of(tmp_path / "out")
    summary = run(flow, source, dest, moto_s3.storage_options)
    reported = {problem["source"].removeprefix(f"{source.uri}/") for problem in summary["problems"]}
    converted, not_here = ([*CONVERTED, ONE_STEP], []) if to == "s3" else (CONVERTED, [ONE_STEP])
    assert reported == {*REPORTED, *not_here}
    assert summary["converted"] == len(converted)
    with ptbin.load(checkpoint) as weights:
        names = list(weights)
    for key in converted:
        output = dest / (key.removesuffix(".pt") + ".bin")
        with ptbin.load(output) as weights:
            assert list(weights) == names
    again = run(flow, source, dest, moto_s3.storage_options)
    assert (again["converted"], again["up_to_date"]) == (0, summary["converted"])
