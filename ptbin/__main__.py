"""The console script `ptbin`, and `python -m ptbin`: find the command line of this installation, call it.

`flows` and `tasks` are names that other projects have too. Where Python finds another project's first (by
PYTHONPATH, or in the working folder of `python -m ptbin`), the answer is one line and exit status 2. The
command line is imported by name, because the engine must not depend on it.

Ctrl-C while modules are imported, and while the process ends, leaves at once and without a traceback; in
between the command line handles it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType

INTERRUPTED = 130

HOME = Path(__file__).resolve().parent.parent
"""The folder that holds `ptbin`, and next to it `flows` and `tasks`."""
COLLECTED_OBJECTS = 50_000
"""New objects between two collections of garbage; Python's own number is 700."""


def main() -> None:
    """Run the command line and exit with its status."""
    # Where a shell started this in the background, SIGINT is ignored, and stays so.
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, _leave_before_the_command)
    problem = _find_taken_name()
    if problem is not None:
        sys.stderr.write(f"ptbin: error: {problem}\n")
        sys.exit(2)
    # What is imported stays, a hundred thousand objects: to look through them for garbage takes 0.1 s.
    gc.set_threshold(COLLECTED_OBJECTS)
    try:
        importlib.import_module("flows.cli").main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
        if handled:
            signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(status))
        raise


def _leave_before_the_command(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, b"ptbin: interrupted\n")
    if "--json" in sys.argv:
        os.write(1, b'{"reason": "interrupted", "detail": "nothing was begun", "exit_status": 130}\n')
    os._exit(INTERRUPTED)


def _find_taken_name() -> str | None:
    """What stands in the way of importing ptbin's own `flows` and `tasks`, in one line; None: nothing."""
    for name in ("flows", "tasks"):
        spec = importlib.util.find_spec(name)
        own = HOME / name / "__init__.py"
        if not own.is_file():
            return f"{own} is missing: install ptbin again"
        found = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if found != own:
            return (
                f"Python finds another module {name} before ptbin's: {found}; take its folder off "
                "PYTHONPATH, or install ptbin into its own environment and call the `ptbin` of that one"
            )
    return None


if __name__ == "__main__":
    main()
