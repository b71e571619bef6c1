"""Reruns over a bucket: how many requests they cost, and that two do not work at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ptbin
from flows.convert import convert
from ptbin import catalog
from ptbin.runs.run_ids import new_run_id
from ptbin.stores.s3 import S3Store
from tasks.live import LiveRun, open_live_run
from tests.servers.endpoint import S3Endpoint
from tests.servers.faulty_proxy import FaultyProxy, faulty_proxy
from tests.servers.fixtures import moto_s3

__all__ = ["moto_s3"]

pytestmark = pytest.mark.usefixtures("server")

COUNT = 18
RECORD = 1
"""A run reads the record of the one before it, for what has changed since."""


class Bucket:
    """Checkpoints below `in`, outputs below `out`."""

    def __init__(self, endpoint: S3Endpoint, seen: S3Endpoint, blank: bytes) -> None:
        self.name = endpoint.make_bucket()
        self.options = seen.storage_options
        self.store = endpoint.store()
        self.blank = blank
        self.add(range(COUNT))

    def add(self, numbers: range) -> None:
        for number in numbers:
            self.store.write_bytes(f"{self.name}/in/run{number % 3}/{number:02}.pt", self.blank)

    def convert(self, **parameters: Any) -> dict[str, Any]:
        with open_live_run(LiveRun(new_run_id(), self.options, self.options)) as live:
            state = convert(
                source=f"s3://{self.name}/in",
                dest=f"s3://{self.name}/out",
                run_id=live.run_id,
                return_state=True,
                **parameters,
            )
        assert state.is_completed(), state.message
        return live.summary

    def index(self) -> list[str]:
        return [item.path for item in self.store.iter_objects(f"{self.name}/out/_ptbin/index")]

    def manifests(self) -> list[str]:
        return list(catalog.find_manifests(f"s3://{self.name}/out", storage_options=self.options))


@pytest.fixture
def proxy(moto_s3: S3Endpoint) -> Iterator[FaultyProxy]:
    with faulty_proxy(moto_s3.url) as proxy:
        yield proxy


@pytest.fixture
def bucket(moto_s3: S3Endpoint, proxy: FaultyProxy, _blank: bytes) -> Bucket:
    """What runs ask of it goes through the proxy, what the test asks does not."""
    return Bucket(moto_s3, replace(moto_s3, url=proxy.url), _blank)


def test_a_rerun_with_nothing_to_do_asks_for_no_object_by_itself(
    bucket: Bucket, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bucket.convert()["converted"] == COUNT
    proxy.requests.clear()
    assert bucket.convert()["up_to_date"] == COUNT
    of_few = len(proxy.requests)
    assert len(bucket.index()) == 1
    assert proxy.operations()["get_object"] == 1 + RECORD
    bucket.add(range(COUNT, 2 * COUNT))
    bucket.convert()
    proxy.requests.clear()
    assert bucket.convert()["up_to_date"] == 2 * COUNT
    assert proxy.operations()["get_object"] == 2 + RECORD  # two segments of the index
    assert len(proxy.requests) == of_few + 1  # the second segment, whole
    # Smaller pages: more listings, and nothing else.
    monkeypatch.setattr(S3Store, "page_keys", 10)
    proxy.requests.clear()
    assert bucket.convert()["up_to_date"] == 2 * COUNT
    assert proxy.operations()["get_object"] == 2 + RECORD


def test_a_lost_index_is_made_again_from_the_manifests(bucket: Bucket, proxy: FaultyProxy) -> None:
    bucket.convert()
    for path in bucket.index():
        bucket.store.delete(f"{bucket.name}/out/_ptbin/index/{path}")
    proxy.requests.clear()
    assert bucket.convert()["up_to_date"] == COUNT
    assert proxy.operations()["get_object"] == COUNT + RECORD
    proxy.requests.clear()
    assert bucket.convert()["up_to_date"] == COUNT
    assert proxy.operations()["get_object"] == 1 + RECORD


def test_many_segments_become_one(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptbin.runs.account.SEGMENT_ROWS", 1)
    bucket.convert()
    assert len(bucket.index()) > 16
    summary = bucket.convert()
    assert summary["up_to_date"] == COUNT
    (segment,) = bucket.index()
    assert segment.endswith("-merged.jsonl.gz")
    assert bucket.convert()["up_to_date"] == COUNT


def test_of_two_runs_at_once_one_works_and_the_destination_is_sound(
    bucket: Bucket, proxy: FaultyProxy
) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(bucket.convert) for _ in range(2)]
    refused = [error for future in both if (error := future.exception()) is not None]
    assert len(refused) <= 1  # none where the first was through before the second looked
    assert all("is at work there" in str(error) for error in refused)
    done = [future.result() for future in both if future.exception() is None]
    assert all(summary["converted"] + summary["up_to_date"] == COUNT for summary in done)
    assert sum(summary["converted"] for summary in done) == COUNT
    manifests = bucket.manifests()
    assert len(manifests) == COUNT
    for manifest in manifests:
        assert ptbin.verify(manifest, storage_options=bucket.options) == []
    # The index may hold rows of manifests that the other run has replaced: they are not believed.
    bucket.convert()
    proxy.requests.clear()
    assert bucket.convert()["up_to_date"] == COUNT
    assert proxy.operations()["get_object"] == len(bucket.index()) + RECORD


def test_the_run_keeps_within_its_requests(bucket: Bucket, tmp_path: Path) -> None:
    with open_live_run(LiveRun(new_run_id(), bucket.options, bucket.options)) as live:
        convert(
            source=f"s3://{bucket.name}/in",
            dest=f"s3://{bucket.name}/out",
            run_id=live.run_id,
            workers=4,
            max_requests=2,
            return_state=True,
        )
        assert live.requests is not None
        assert 0 < live.requests.peak <= 2
