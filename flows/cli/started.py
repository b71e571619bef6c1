"""When the command was given: a run's duration is counted from there, not from when a server was up."""

from __future__ import annotations

import time

_began = time.monotonic()


def began() -> float:
    """On `time.monotonic`'s clock; of the first command, when this module was imported, first of all."""
    return _began


def begin_again() -> None:
    """Another command in the same process."""
    global _began  # noqa: PLW0603 - there is one command at a time
    _began = time.monotonic()
