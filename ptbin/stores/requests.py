"""How requests are made of a store: how many at once, and again where that may help. Knows no backend.

A slot is held while a request is on the wire, body included, never while a retry waits. The process's limit
is what sockets and a server's patience allow; a run's own is a promise to the store's other users, and is
carried by the context, so that engine calls need no argument for it. Requests wait for their slots on the
event loop that makes them, fsspec's: no thread is held up.

    with limit_requests(RequestLimit(16)):
        ptbin.convert(...)
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import asynccontextmanager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ptbin.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

__all__ = [
    "PROCESS_LIMIT", "RequestLimit", "RetryPolicy", "call_with_retries", "call_with_retries_async",
    "limit_requests", "request_slot",
]  # fmt: skip

T = TypeVar("T")


class RequestLimit:
    """At most `count` requests at once among all that share this; `peak` is the most there were.

    Belongs to one event loop at a time: in a forked process all slots are free again.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"{count} requests at once: nothing could be asked")
        self.count = count
        self.peak = 0
        self._process = 0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        if self._process != os.getpid():
            self._process, self._slots, self._used = os.getpid(), asyncio.Semaphore(self.count), 0
        async with self._slots:
            self._used += 1
            self.peak = max(self.peak, self._used)
            try:
                yield
            finally:
                self._used -= 1


PROCESS_LIMIT = RequestLimit(64)
_of_run: ContextVar[RequestLimit | None] = ContextVar("ptbin_request_limit", default=None)


@contextmanager
def limit_requests(limit: RequestLimit | None) -> Iterator[None]:
    """Requests that this context makes stay within `limit` as well."""
    token = _of_run.set(limit)
    try:
        yield
    finally:
        _of_run.reset(token)


@asynccontextmanager
async def request_slot() -> AsyncIterator[None]:
    """Wait for a free slot, hold it for one request."""
    limit = _of_run.get()
    async with limit.slot() if limit is not None else nullcontext(), PROCESS_LIMIT.slot():
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long a store is given to recover: by default eight attempts over 6 to 13 seconds.

    The first waits are short, because most faults are of one request alone and hold up what is behind it.
    """

    attempts: int = 8
    first_delay_s: float = 0.1
    max_delay_s: float = 20.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"{self.attempts} attempts: at least one is needed")

    def delays_s(self) -> Iterator[float]:
        """The waits between attempts: doubling, each shortened at random by up to a half.

        So a thousand workers that were throttled together do not come back together.
        """
        for doublings in range(self.attempts - 1):
            full = min(self.max_delay_s, self.first_delay_s * 2**doublings)
            yield full * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing


def call_with_retries(operation: Callable[[], T], policy: RetryPolicy) -> T:
    """`operation()`, again while it raises a transient StorageError and attempts are left."""
    for delay_s in policy.delays_s():
        try:
            return operation()
        except StorageError as error:
            if not error.transient:
                raise
        time.sleep(delay_s)
    return operation()


async def call_with_retries_async(operation: Callable[[], Awaitable[T]], policy: RetryPolicy) -> T:
    """As `call_with_retries`, on an event loop."""
    for delay_s in policy.delays_s():
        try:
            return await operation()
        except StorageError as error:
            if not error.transient:
                raise
        await asyncio.sleep(delay_s)
    return await operation()
