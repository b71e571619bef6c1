"""Running the processes that import torch and the caller's code. Request and answer are JSON files.

A child runs nothing but what is installed and what the caller names. It starts isolated (`-I`: no working
folder, no user site, no PYTHON* variable); PYTHONPATH serves it last, and only where torch is found nowhere
else. The caller's own folders are for `user_code` to search.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ptbin.errors import UsageError

__all__ = ["run_child"]

SHOWN_LINES = 12

_BEGIN = """
import importlib.util, runpy, sys
package, module, fallback = sys.argv[1], sys.argv[2], [p for p in sys.argv[3].split("\\n") if p]
del sys.argv[1:4]
if importlib.util.find_spec("ptbin") is None:
    sys.path.append(package)
if importlib.util.find_spec("torch") is None:
    sys.path.extend(fallback)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""What the isolated interpreter runs. ptbin's own folder counts where ptbin is not installed (PYTHONPATH)."""

_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])


def run_child(module: str, request: dict[str, Any], doing: str, *, neutral: bool = False) -> dict[str, Any]:
    """What `module`, run as a script, answers. Its standard output is not ours: user code may print.

    `neutral`: it runs in an empty folder and not in the caller's, where no code of the caller's is to run.

    Raises:
        UsageError: the process died, or the user's code raised; with the last lines it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="ptbin-") as folder:
        asked, answered, said = (
            Path(folder) / name for name in ("request.json", "answer.json", "output.txt")
        )
        asked.write_text(json.dumps(request), encoding="utf-8")
        empty = Path(folder) / "empty"
        empty.mkdir()
        with said.open("wb") as log:
            begin = ["-c", _BEGIN, _PACKAGE_FOLDER, module, "\n".join(python_path())]
            child = subprocess.Popen(
                [sys.executable, "-I", *begin, str(asked), str(answered)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=empty if neutral else None,
            )
            try:
                child.wait()
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        if answered.exists():
            answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
            if "error" not in answer:
                return answer
            raise UsageError(f"{doing}: {answer['error']}")
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-SHOWN_LINES:]
        raise UsageError(
            "\n".join([f"{doing}: the process ended with status {child.returncode} and said:", *lines])
        )


def python_path() -> list[str]:
    """The folders on PYTHONPATH, absolute. Empty entries, which mean the working folder, do not count."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(entry) for entry in entries if entry]
