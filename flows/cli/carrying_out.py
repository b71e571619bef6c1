"""A request of `convert`, `restore` or `sync`: carried out, by the engine or by its flow, or only planned."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from flows.cli.plans import print_dry_run
from flows.cli.progress import showing_progress
from flows.cli.shared_options import Shared
from flows.cli.single import plan_one, run_one
from flows.cli.summary import conversion_lines, report_summary, untold
from flows.parsing import refuse_secrets

if TYPE_CHECKING:
    from flows.cli.single import Make
    from ptbin.catalog import Job
    from ptbin.catalog.request import RunRequest
    from ptbin.runs.dry_run import Look

__all__ = ["carry_out"]


def carry_out(
    request: RunRequest,
    asked: dict[str, Any],
    shared: Shared,
    *,
    single: Job | None = None,
    make: Make | None = None,
    look: Look | None = None,
    dry_run: bool,
) -> int:
    """Do it, or with `dry_run` print what would be done; the exit status.

    Args:
        asked: the parameters of the flow.
        single: the job where SOURCE is one checkpoint: the engine does it without Prefect, by `make`.
        look: what a dry run asks of each job; left out, what a conversion would do.
    """
    if dry_run:
        from ptbin.catalog.plan import Plan
        from ptbin.runs.dry_run import dry_run as plan_run

        if single is not None:
            return print_dry_run(plan_one(single, request, look, shared), shared)
        with closing(Plan(request, shared.sides)) as plan:
            return print_dry_run(plan_run(plan, look), shared)
    if single is not None:
        assert make is not None
        return report_summary(request.kind, *run_one(single, request, make, shared), shared)
    refuse_secrets(request.source, request.dest)
    from flows.cli.on_prefect import run_prepared

    with showing_progress(shared) as listener:
        summary = run_prepared(request, shared, listener, **asked)
    return report_summary(request.kind, summary, conversion_lines(untold(summary, listener.told)), shared)
