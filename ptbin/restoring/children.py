"""Running the processes that import torch and the caller's code. Request and answer are JSON files."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ptbin.errors import UsageError

__all__ = ["run_child"]

SHOWN_LINES = 12


def run_child(module: str, request: dict[str, Any], doing: str) -> dict[str, Any]:
    """What `python -m MODULE` answers. Its standard output is not ours: user code may print.

    Raises:
        UsageError: the process died, or the user's code raised; with the last lines it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="ptbin-") as folder:
        asked, answered, said = (
            Path(folder) / name for name in ("request.json", "answer.json", "output.txt")
        )
        asked.write_text(json.dumps(request), encoding="utf-8")
        with said.open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", module, str(asked), str(answered)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
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
