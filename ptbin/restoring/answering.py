"""How a child process answers its one request: JSON in, JSON out, and no time spent on taking torch apart.

Imports neither torch nor the caller's code.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class RefusalError(Exception):
    """Something the caller can mend; its text is the answer."""


def answer_request(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> NoReturn:
    """Answer the request on standard input into the file that the first argument names.

    The process ends at once; handlers of `atexit` do not run. Taking down an interpreter with torch in it
    takes a quarter of a second, for which the parent would wait.
    """
    try:
        found = answer(json.load(sys.stdin))
    except RefusalError as refusal:
        found = {"error": str(refusal)}
    except Exception as error:  # noqa: BLE001 - whatever the caller's code raises is reported to the caller
        found = {"error": error_text(error)}
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def error_text(error: BaseException) -> str:
    """An exception and where it was raised, in one line."""
    what = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__)
    return f"{what} (raised in {frames[-1].filename}, line {frames[-1].lineno})" if frames else what
