"""When to try again: only faults of a store that says it is worth it (`StorageError.transient`)."""

from __future__ import annotations

import random

from ptbin.errors import StorageError

RETRIES = 3
RETRY_DELAYS = [2.0, 6.0, 18.0]
"""Seconds before each retry; stores have already retried single requests when a run sees an error."""
JITTER = 0.5
"""Up to this share is added, so that workers that failed together do not return together."""


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help."""
    return isinstance(error, StorageError) and error.transient


def retry_delay(retry: int) -> float:
    """Seconds to wait before retry number `retry` (from 1), with jitter."""
    return RETRY_DELAYS[min(retry, RETRIES) - 1] * (1 + JITTER * random.random())  # noqa: S311 - not a secret
