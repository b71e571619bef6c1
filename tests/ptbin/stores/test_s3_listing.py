"""Listings in ranges are the plain listing, whatever the keys, and cost O(pages) requests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from fsspec.asyn import get_loop

from ptbin.stores.s3_client import S3Client
from ptbin.stores.s3_listing import MAX_RANGES, MAX_SURVEY_REQUESTS, iter_entries

PAGE = 10


class Fake(S3Client):
    """A bucket of keys that answers listings as S3 documents them."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__({})
        self.keys = sorted(keys, key=str.encode)
        self.requests: list[dict[str, Any]] = []

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = get_loop()
        return loop

    async def send(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        assert method == "list_objects_v2"
        self.requests.append(parameters)
        prefix, most = parameters["Prefix"], parameters.get("MaxKeys", PAGE)
        after = (parameters.get("ContinuationToken") or parameters.get("StartAfter", "")).encode()
        contents: list[dict[str, Any]] = []
        folders: list[str] = []
        for key in self.keys:
            if not key.startswith(prefix) or (key.encode() <= after and "Delimiter" not in parameters):
                continue
            rest = key[len(prefix) :]
            if "Delimiter" in parameters and "/" in rest:
                folder = prefix + rest.partition("/")[0] + "/"
                if folder not in folders:
                    folders.append(folder)
            else:
                contents.append({"Key": key, "Size": len(key), "ETag": f'"{key}"'})
            if len(contents) + len(folders) > most:
                contents = contents[:most]
                answer = {"Contents": contents, "IsTruncated": True}
                if contents:
                    answer["NextContinuationToken"] = contents[-1]["Key"]
                return answer | {"CommonPrefixes": [{"Prefix": folder} for folder in folders[:most]]}
        return {
            "Contents": contents,
            "IsTruncated": False,
            "CommonPrefixes": [{"Prefix": folder} for folder in folders],
        }


def _many_folders() -> list[str]:
    return [f"p/run{run:03}/step{step}.pt" for run in range(120) for step in range(7)]


def _deep_chain() -> list[str]:
    return [f"p/a/b/c/d/e/{run}/{step}.pt" for run in range(40) for step in range(9)]


def _flat() -> list[str]:
    return [f"p/{number:05}.pt" for number in range(500)]


def _nasty() -> list[str]:
    rng = random.Random(5)
    letters = ["a", "b", "/", "/", "é", "\U0001f600", "￿", "-", " ", "%", "+", "."]
    return sorted({"p/" + "".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(900)})


def _one_large_among_small() -> list[str]:
    return [f"p/{name}/x.pt" for name in "abcdefgh"] + [f"p/m/{n // 50:03}/{n:05}.pt" for n in range(2000)]


def _objects_beside_folders() -> list[str]:
    return [f"p/{n:04}" for n in range(100)] + [f"p/{n:04}/x/{m}" for n in range(0, 100, 3) for m in range(8)]


KINDS: list[Callable[[], list[str]]] = [
    _many_folders,
    _deep_chain,
    _flat,
    _nasty,
    _one_large_among_small,
    _objects_beside_folders,
]


@pytest.mark.parametrize("keys", KINDS, ids=lambda kind: kind.__name__.lstrip("_"))
@pytest.mark.parametrize("prefix", ["p/", "", "p/a/"])
def test_it_is_the_plain_listing(keys: Callable[[], list[str]], prefix: str) -> None:
    client = Fake(keys())
    found = list(iter_entries(client, "s3://b/p", "b", prefix, page_keys=PAGE))
    assert [key for key, _, _ in found] == [key for key in client.keys if key.startswith(prefix)]
    assert all(size == len(key) and etag == key for key, size, etag in found)
    assert len(client.requests) <= len(found) / PAGE + 1 + MAX_SURVEY_REQUESTS + MAX_RANGES


def test_a_small_prefix_costs_one_request() -> None:
    client = Fake([f"p/{number}" for number in range(PAGE)])
    assert len(list(iter_entries(client, "s3://b/p", "b", "p/", page_keys=PAGE))) == PAGE
    assert len(client.requests) == 1


def test_a_listing_that_is_broken_off_stops_asking() -> None:
    client = Fake(_many_folders())
    entries = iter_entries(client, "s3://b/p", "b", "p/", page_keys=PAGE)
    for _ in range(25):
        next(entries)
    entries.close()  # type: ignore[attr-defined]  # a generator
    assert len(client.requests) < 84 + MAX_SURVEY_REQUESTS


@pytest.mark.s3_real
def test_on_a_real_server(rados_s3: Any) -> None:
    bucket = rados_s3.make_bucket()
    store = rados_s3.store()
    keys = [f"p/{run}/{step}.pt" for run in "abcé" for step in range(12)] + ["p/b", "p/a.pt", "p/zz/ÿ/x.pt"]
    for key in keys:
        store.write_bytes(f"{bucket}/{key}", key.encode())
    store.page_keys = 5
    found = [item.path for item in store.iter_objects(f"{bucket}/p")]
    assert found == [key[2:] for key in sorted(keys, key=str.encode)]
