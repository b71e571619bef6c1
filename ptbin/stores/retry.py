"""Asking a store again, where asking again may help.

Owns when and how often: bounded attempts, exponential delays with jitter (so that a thousand workers
that were throttled together do not come back together). Knows no backend: an operation says by
`StorageError.transient` whether its failure may pass; anything else is raised at once, untouched.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ptbin.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

__all__ = ["RetryPolicy", "call_with_retries", "call_with_retries_async"]

T = TypeVar("T")


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
        """The waits between attempts: doubling, each shortened at random by up to a half."""
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
    """`await operation()`, again while it raises a transient StorageError and attempts are left."""
    for delay_s in policy.delays_s():
        try:
            return await operation()
        except StorageError as error:
            if not error.transient:
                raise
        await asyncio.sleep(delay_s)
    return await operation()
