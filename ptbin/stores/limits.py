"""How many requests may be under way at once: per process always, per run where one asks for it.

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
from contextlib import asynccontextmanager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

__all__ = ["PROCESS_REQUESTS", "RequestLimit", "limit_requests", "process_limit", "request_slot"]

PROCESS_REQUESTS = 64


class RequestLimit:
    """At most `count` requests at once among all that share this; `peak` is the most there were.

    Belongs to one event loop at a time: in a forked process all slots are free again.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"{count} requests at once: nothing could be asked")
        self.count = count
        self.peak = 0
        self._renew()

    def _renew(self) -> None:
        self._process = os.getpid()
        self._slots = asyncio.Semaphore(self.count)
        self._used = 0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        if self._process != os.getpid():
            self._renew()
        async with self._slots:
            self._used += 1
            self.peak = max(self.peak, self._used)
            try:
                yield
            finally:
                self._used -= 1


_process = RequestLimit(PROCESS_REQUESTS)
_of_run: ContextVar[RequestLimit | None] = ContextVar("ptbin_request_limit", default=None)


def process_limit() -> RequestLimit:
    """This process's limit."""
    return _process


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
    async with limit.slot() if limit is not None else nullcontext(), _process.slot():
        yield
