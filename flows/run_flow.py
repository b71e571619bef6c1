"""`@run_flow`: what the five flows have in common, and how they are called from Python.

Called as a function, a flow returns its `RunResult`, or raises `RunFailedError` with one, `UsageError` where
the call is wrong, and what stopped it. With `return_state=True` it returns Prefect's state, of which
`state.result(raise_on_failure=False)` gives the same. Results are held in memory only: of a deployed run read
its record in DEST.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from prefect import Flow, flow
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.forms import Text, takes
from flows.parsing import MAX_WORKERS
from ptbin.runs.result import RunResult
from ptbin.values.options import Option

__all__ = ["run_flow"]

if TYPE_CHECKING:

    class RunFlow(Flow[..., RunResult]):
        """A flow as type checkers see it."""

        @overload  # type: ignore[override]
        def __call__(self, *places: Text, return_state: Literal[True], **asked: Any) -> State[RunResult]: ...
        @overload
        def __call__(self, *places: Text, **asked: Any) -> RunResult: ...
        def __call__(self, *places: Text, **asked: Any) -> Any: ...


def run_flow(places: Sequence[Option], options: Sequence[Option]) -> Callable[[Callable[..., Any]], RunFlow]:
    """A flow of the function's name, with the parameters that these options stand for."""

    def decorate(function: Callable[..., Any]) -> RunFlow:
        made = flow(
            name=function.__name__,
            flow_run_name=" to ".join(f"{{{place.name}}}" for place in places),
            # Wide enough for any `workers`; the fan-out itself never has more in flight than it was told.
            task_runner=ThreadPoolTaskRunner(max_workers=MAX_WORKERS),  # type: ignore[arg-type]
            persist_result=False,
        )(takes(places, options)(function))
        return cast("RunFlow", made)

    return decorate
