"""No more requests at once than the process, and the run, allow."""

from __future__ import annotations

import asyncio
import os

import pytest

from ptbin.stores.requests import PROCESS_LIMIT, RequestLimit, limit_requests, request_slot
from tests.servers.endpoint import S3Endpoint

MIB = 1 << 20


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing could be asked"):
        RequestLimit(0)


def test_a_run_keeps_within_its_own_limit(moto_s3: S3Endpoint) -> None:
    bucket = moto_s3.make_bucket()
    store = moto_s3.store(config_kwargs={"user_agent_extra": bucket})
    content = bytes(range(256)) * 16 * 4096
    store.write_bytes(f"{bucket}/x", content)
    at_once, most = 0, 0

    def begin(**_: object) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)

    def end(**_: object) -> None:
        nonlocal at_once
        at_once -= 1

    events = store.client.fs.s3.meta.events
    events.register("before-call.s3", begin)
    events.register("after-call.s3", end)
    limit = RequestLimit(2)
    with limit_requests(limit), store.open_reader(f"{bucket}/x") as reader:
        got = b"".join(reader.iter_range(0, reader.size, chunk_nbytes=MIB))
    assert got == content
    assert most <= 2
    assert limit.peak == 2  # and it was made use of


def test_the_process_has_one_as_well() -> None:
    async def take_two() -> None:
        async with request_slot(), request_slot():
            assert PROCESS_LIMIT.peak >= 2

    asyncio.run(take_two())


def test_slots_that_were_held_are_free_in_a_forked_process() -> None:
    limit = RequestLimit(1)

    async def take() -> None:
        async with limit.slot():
            pass

    async def fork_while_held() -> int:
        async with limit.slot():
            return os.fork()

    child = asyncio.run(fork_while_held())
    if child == 0:
        status = 1
        try:
            asyncio.run(asyncio.wait_for(take(), 10))
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
