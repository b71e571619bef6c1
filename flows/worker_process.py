"""How flow runs of a process pool get the time to end well when their worker is stopped.

A Prefect worker that gets SIGTERM sends one to each process it has started and SIGKILL right behind it
(`prefect.utilities.processutils.open_process`, when cancelled), so a run would leave its lease, its uploads
and the state `Running`. Two small processes stand in between:

- `python -P -m flows.worker_process`, the `command` of deployments/work-pools/process.json: does nothing but
  wait for the flow's own process, its child. That one sees when it is killed, and ends as after SIGTERM.
- `python -P -m flows.worker_process prefect worker start ...`: a worker, and then a wait for all that it
  leaves behind. For containers, where the end of the first process is the end of all (compose.yaml).

Knows nothing of flows; what a run does when it is to end is in `flows.interrupts` and
`flows.conversion`.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

WATCH_SECONDS = 0.5
GRACE_SECONDS = 60.0
"""How long a run may take to end; it needs some seconds (`flows.fanout.DRAIN_SECONDS`)."""
_FLOW = "--flow-of"
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main(words: Sequence[str]) -> int:
    """Be one of the two, or the flow's own process, which the first one starts."""
    if words[:1] == [_FLOW]:
        threading.Thread(target=_watch, args=[int(words[1])], name="ptbin-worker-watch", daemon=True).start()
        sys.stdout, sys.stderr = _text(1), _text(2)
        sys.argv[1:] = []  # Prefect's engine would take them for its own
        runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)
        return 0
    if words:
        _adopt_orphans()
        status = _wait_for(words)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
    else:
        # -P: the run's working directory must not become a place to import from.
        status = _wait_for([sys.executable, "-P", "-m", "flows.worker_process", _FLOW, str(os.getpid())])
    if status < 0:  # a worker logs which signal it was
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return abs(status)


class _Unread(io.FileIO):
    """Output whose reader may be gone. The worker did; rich, in Prefect's log, ends the process then."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            return len(data)


def _text(descriptor: int) -> io.TextIOWrapper:
    raw = _Unread(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", line_buffering=True)


def _wait_for(words: Sequence[str]) -> int:
    """Run a command, hand it the first SIGTERM; its exit status, as `subprocess` gives it."""
    passed_on = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal passed_on
        del frame
        # Once: the worker sends another right before it kills, and that would cut through the end of the run.
        if not passed_on:
            passed_on = True
            child.send_signal(number)

    # Held back until there is a child to pass it on to.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child by itself
    child = subprocess.Popen(list(words), preexec_fn=_as_before)  # noqa: PLW1509 - there are no threads yet
    signal.signal(signal.SIGTERM, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return child.wait()


def _as_before() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _adopt_orphans() -> None:
    """Processes whose parent ends become ours, as they would be those of a container's first process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    from flows.interrupts import end_run

    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        end_run()  # again and again: it may not have begun yet
        time.sleep(WATCH_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
