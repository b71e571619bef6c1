"""How many requests may be under way at once: per process always, per run where one asks for it.

A slot is held while a request is on the wire, body included, never while a retry waits. The process's limit
is what sockets and a server's patience allow; a run's own is a promise to the store's other users, and is
carried by the context, so that engine calls need no argument for it.

    with limit_requests(RequestLimit(16)):
        ptbin.convert(...)
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PROCESS_REQUESTS", "RequestLimit", "limit_requests", "process_limit", "request_slot"]

PROCESS_REQUESTS = 64


class RequestLimit:
    """At most `count` requests at once among all threads that share this; `peak` is the most there were."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"{count} requests at once: nothing could be asked")
        self.count = count
        self.peak = 0
        self._slots = threading.Semaphore(count)
        self._lock = threading.Lock()
        self._used = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        with self._slots:
            with self._lock:
                self._used += 1
                self.peak = max(self.peak, self._used)
            try:
                yield
            finally:
                with self._lock:
                    self._used -= 1


_process = RequestLimit(PROCESS_REQUESTS)
_of_run: ContextVar[RequestLimit | None] = ContextVar("ptbin_request_limit", default=None)


def _renew_after_fork() -> None:
    # Slots that threads of the parent held would never come back.
    global _process  # noqa: PLW0603 - one process, one limit
    _process = RequestLimit(PROCESS_REQUESTS)


os.register_at_fork(after_in_child=_renew_after_fork)


def process_limit() -> RequestLimit:
    """This process's limit."""
    return _process


@contextmanager
def limit_requests(limit: RequestLimit | None) -> Iterator[None]:
    """Requests of this context, and of threads that the stores start for it, stay within `limit` as well."""
    token = _of_run.set(limit)
    try:
        yield
    finally:
        _of_run.reset(token)


@contextmanager
def request_slot() -> Iterator[None]:
    """Wait for a free slot, hold it for one request."""
    limit = _of_run.get()
    if limit is None:
        with _process.slot():
            yield
        return
    with limit.slot(), _process.slot():
        yield
