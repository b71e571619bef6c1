"""Running the processes that import torch and the caller's code. Request and answer are JSON.

A child runs nothing but what is installed and what the caller names. It starts isolated (`-I`: no working
folder, no user site, no PYTHON* variable); PYTHONPATH serves it last, and only where torch is found nowhere
else. The caller's own folders are for `user_code` to search.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptbin.errors import StorageError, UsageError
from ptbin.installed import missing_line

SHOWN_LINES = 12

_BEGIN = """
import importlib.util, json, runpy, sys
package, module, missing, fallback = *sys.argv[1:4], [p for p in sys.argv[4].split("\\n") if p]
del sys.argv[1:5]
if importlib.util.find_spec("ptbin") is None:
    sys.path.append(package)
if importlib.util.find_spec("torch") is None:
    sys.path.extend(fallback)
if importlib.util.find_spec("torch") is None:
    with open(sys.argv[1], "w") as answer:
        answer.write(json.dumps({"error": missing}))
    sys.exit(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""What the isolated interpreter runs. ptbin's own folder counts where ptbin is not installed (PYTHONPATH)."""

_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])


class Child:
    """One process: it imports torch as soon as it starts, and waits for its request."""

    def __init__(self, module: str, doing: str, folder: Path, pass_fds: tuple[int, ...]) -> None:
        self._doing = doing
        self._answered, self._said = folder / "answer.json", folder / "output.txt"
        missing = missing_line("torch", "--model")
        begin = ["-c", _BEGIN, _PACKAGE_FOLDER, module, missing, "\n".join(python_path())]
        # Its standard output is not ours: user code may print.
        with self._said.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", *begin, str(self._answered)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
            )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Hand the request over, and wait for the answer.

        Raises:
            UsageError: the process died, or the user's code raised; with the last lines it wrote.
            StorageError: it could not write the file.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode())
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        if self._answered.exists():
            answer: dict[str, Any] = json.loads(self._answered.read_text(encoding="utf-8"))
            if "unwritable" in answer:
                raise StorageError(f"{self._doing}: the file cannot be written: {answer['unwritable']}")
            if "error" not in answer:
                return answer
            raise UsageError(f"{self._doing}: {answer['error']}")
        lines = self._said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-SHOWN_LINES:]
        status = self._process.returncode
        raise UsageError(
            "\n".join([f"{self._doing}: the process ended with status {status} and said:", *lines])
        )

    def end(self) -> None:
        """Kill it where it still runs: it was not asked, or this process was interrupted."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def start_child(module: str, doing: str, *, pass_fds: tuple[int, ...] = ()) -> Iterator[Child]:
    """Start `module` as a script, in the caller's working folder, whose files the caller's code may read.

    `pass_fds`: descriptors that it inherits.
    """
    with tempfile.TemporaryDirectory(prefix="ptbin-") as folder:
        child = Child(module, doing, Path(folder), pass_fds)
        try:
            yield child
        finally:
            child.end()


def python_path() -> list[str]:
    """The folders on PYTHONPATH, absolute. Empty entries, which mean the working folder, do not count."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(entry) for entry in entries if entry]
