"""Which tests start servers and processes, or import other projects: marked for `make test-quick` to leave
them out.

Fixtures that start something mark the tests that ask for them; others carry the marker themselves. A test
that starts Python without either fails in `make test-quick`, and says what to do.
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests import warm_python

__all__ = ["PROCESSES", "SERVERS", "mark", "only_where_marked", "watch"]

PROCESSES, SERVERS = "starts_processes", "starts_servers"

BY_PARAMETER = {"s3", "moto", "rados"}
BY_FIXTURE = {
    "chromium": PROCESSES,
    "ptbin": PROCESSES,
    "ptbin_started": PROCESSES,
    "warm_children": PROCESSES,
    "moto_s3": SERVERS,
    "rados_s3": SERVERS,
    "server": SERVERS,
    "stack": SERVERS,
}

_unmarked: str | None = None


def mark(item: pytest.Item) -> None:
    """Give a test the markers of its fixtures, and of parameters that stand for a server."""
    for name, marker in BY_FIXTURE.items():
        if name in getattr(item, "fixturenames", ()):
            item.add_marker(marker)
    if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
        values = {value for value in item.callspec.params.values() if isinstance(value, str)}
        if any(getattr(value, "thorough", False) for value in item.callspec.params.values()):
            item.add_marker("thorough")
        if values & BY_PARAMETER:
            item.add_marker(SERVERS)


@contextlib.contextmanager
def only_where_marked(item: pytest.Item) -> Iterator[None]:
    """Refuse to start Python for a test that has neither marker, while the context lasts."""
    global _unmarked  # noqa: PLW0603 - one test at a time
    _unmarked = (
        None if item.get_closest_marker(PROCESSES) or item.get_closest_marker(SERVERS) else item.nodeid
    )
    try:
        yield
    finally:
        _unmarked = None


def watch() -> None:
    """Look at every start of a process from now on."""
    popen, start = subprocess.Popen.__init__, multiprocessing.process.BaseProcess.start

    def watched_popen(self: subprocess.Popen[Any], args: Any, *more: Any, **options: Any) -> None:
        words = [args] if isinstance(args, str) else [str(word) for word in args]
        if sys.executable in words or words[0].endswith("ptbin") or warm_python.is_stand_in(words[0]):
            _refuse()
        popen(self, args, *more, **options)

    def watched_start(self: multiprocessing.process.BaseProcess) -> None:
        _refuse()
        start(self)

    subprocess.Popen.__init__ = watched_popen  # type: ignore[method-assign]
    multiprocessing.process.BaseProcess.start = watched_start  # type: ignore[method-assign]


def _refuse() -> None:
    if _unmarked is not None:
        pytest.fail(f"{_unmarked} starts a process: mark it @pytest.mark.{PROCESSES}")
