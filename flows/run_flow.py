"""`@run_flow`: what the five flows have in common, and how they are called from Python.

Called as a function, a flow returns its `RunResult`, or raises `RunFailedError` with one, `UsageError` where
the call is wrong, and what stopped it. With `return_state=True` it returns Prefect's state, of which
`state.result(raise_on_failure=False)` gives the same. Results are held in memory only: of a deployed run read
its record in DEST.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from prefect import Flow, flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.forms import takes
from flows.parsing import MAX_WORKERS
from flows.prefect.undocumented import flow_run_context
from flows.requests import Text
from ptbin.errors import PtbinError
from ptbin.runs.result import RunResult
from ptbin.values.options import Option

if TYPE_CHECKING:

    class RunFlow(Flow[..., RunResult]):
        """A flow as type checkers see it."""

        @overload  # type: ignore[override]
        def __call__(self, *places: Text, return_state: Literal[True], **asked: Any) -> State[RunResult]: ...
        @overload
        def __call__(self, *places: Text, **asked: Any) -> RunResult: ...
        def __call__(self, *places: Text, **asked: Any) -> Any: ...


def _fails_with_one_line(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the flow made of `function` end Failed, with the reason and message of an error of ptbin's.

    Prefect would log what a flow raises with its traceback, which says nothing to the readers of the run's
    page. A caller of the flow as a function gets the error raised. Anything else is a bug, and keeps its
    traceback.
    """

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

    return run


def run_flow(places: Sequence[Option], options: Sequence[Option]) -> Callable[[Callable[..., Any]], RunFlow]:
    """A flow of the function's name, with the parameters that these options stand for."""

    def decorate(function: Callable[..., Any]) -> RunFlow:
        made = flow(
            name=function.__name__,
            flow_run_name=" to ".join(f"{{{place.name}}}" for place in places),
            # Wide enough for any `workers`; the fan-out never has more in flight than `workers`.
            task_runner=ThreadPoolTaskRunner(max_workers=MAX_WORKERS),  # type: ignore[arg-type]
            persist_result=False,
        )(takes(places, options)(_fails_with_one_line(function)))
        return cast("RunFlow", made)

    return decorate
