"""How a flow run ends that could not be carried out: `Failed`, with one line that says why.

Prefect would log what a flow raises with its traceback, which says nothing to the people who read the run's
page. So an error of ptbin's own (SOURCE is not there, DEST is busy, credentials that are missing) is returned
as the run's state. A caller of the flow as a function gets the error raised, as before. Anything else is a
bug, and keeps its traceback.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from prefect import get_run_logger
from prefect.states import Failed

from flows.prefect.undocumented import flow_run_context
from ptbin.errors import PtbinError

__all__ = ["fails_with_one_line"]

Function = TypeVar("Function", bound=Callable[..., Any])


def fails_with_one_line(function: Function) -> Function:
    """Let the flow made of `function` end Failed with the error's reason and message."""

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except PtbinError as error:
            if flow_run_context() is None:
                raise
            line = " ".join(f"{error.reason}: {error}".split())
            get_run_logger().error("%s", line)
            return Failed(message=line, data=error)

    return cast("Function", run)
