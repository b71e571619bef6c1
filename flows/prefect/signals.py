"""What Ctrl-C and SIGTERM are raised as while a flow runs; how they are handled is in `flows.interrupts`."""

from __future__ import annotations

from prefect.exceptions import TerminationSignal

INTERRUPTS = (KeyboardInterrupt, TerminationSignal)
"""The latter is Prefect's, for SIGTERM."""


def is_hidden_interrupt(error: BaseException) -> bool:
    """Whether another error stands for an interrupt that came in the middle of other code.

    pydantic wraps whatever is raised in its serializers, a signal's exception too, and keeps only the name.
    Prefect handles SIGTERM itself from the start of a flow run until the flow's first line.
    """
    return any(kind.__name__ in f"{type(error).__name__}: {error}" for kind in INTERRUPTS)
