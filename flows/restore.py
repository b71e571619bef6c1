"""The restore flow: every set of weights below SOURCE becomes a proven `.pt` below DEST.

The same run as a conversion's (`flows.conversion`): listing, what is up to date, batches, retries, record.
Only the work of a batch differs, and that it is proven as part of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.access import DEFAULT_REQUESTS, join_run, open_work
from flows.conversion import Conversion
from flows.fanout import Work, unexamined
from flows.run_record import new_run_id
from flows.tally import Tally
from flows.wishes import MAX_WORKERS, refuse_secrets
from ptbin import RestoreOptions, catalog
from ptbin.catalog import Job, OutputRule
from ptbin.errors import UsageError
from ptbin.options import Naming
from ptbin.restoring.restore import SaveAs
from tasks.listing import list_checkpoints, work_of
from tasks.live import LiveRun
from tasks.restoring import restore_batch
from tasks.retrying import retry_delay

__all__ = ["restore"]


class Restoration(Conversion):
    """A conversion whose batches restore."""

    def __init__(
        self, live: LiveRun, options: RestoreOptions, tally: Tally, workers: int, fail_fast: bool
    ) -> None:
        super().__init__(live, options.conversion(), tally, workers, fail_fast)
        self.restore_options = options

    def _convert(self, jobs: Sequence[Job], retry: int = 0) -> Work:
        label = self._label(jobs, retry)

        def submit() -> PrefectFuture[Any]:
            return restore_batch.submit(
                self.live.run_id, label, unexamined(jobs), unexamined(self.restore_options)
            )

        def then(state: State[Any]) -> Iterable[Work]:
            _, again = self._collect(jobs, state, retry)
            if again:
                yield self._convert(again, retry + 1)

        return Work(submit, then, delay=retry_delay(retry) if retry else 0.0)


@flow(
    name="restore",
    flow_run_name="{source} to {dest}",
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_WORKERS),  # type: ignore[arg-type]
    persist_result=False,
)
def restore(
    source: str,
    dest: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    model: str | None = None,
    model_args: dict[str, Any] | list[Any] | None = None,
    model_path: str | None = None,
    save_as: SaveAs | None = None,
    example: str | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    select: str | None = None,
    naming: Naming = "replace",
    force: bool = False,
    fail_fast: bool = False,
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = 2,
    max_requests: Annotated[int, Field(ge=1)] = DEFAULT_REQUESTS,
    source_options: str | None = None,
    dest_options: str | None = None,
    run_id: str | None = None,
) -> State[Any]:
    """Restore every set of weights below `source` into `dest`.

    Ends Completed, or Failed where one was rejected or failed. What is up to date is passed over, unless a
    model is named: its code may have changed.
    """
    options = RestoreOptions(
        model=model,
        model_args=model_args,
        model_path=model_path,
        save_as=save_as,
        example=example,
        allow_missing=tuple(allow_missing),
        allow_unexpected=tuple(allow_unexpected),
        select=select,
        force=force,
    )
    refuse_secrets(source, dest)
    started = time.monotonic()
    with (
        join_run(run_id or new_run_id(), source_options, dest_options) as live,
        open_work(live, dest, max_requests),
    ):
        catalog.check_call(source, dest, source_options=live.source_options, dest_options=live.dest_options)
        # A model's code may have changed: what it made is never up to date.
        wishes = replace(options.conversion(), force=force or model is not None)
        problems = list_checkpoints(
            live.run_id,
            source,
            unexamined(OutputRule(dest, naming, ".pt")),
            unexamined(wishes),
            list(include),
            list(exclude),
        )
        if not problems and not work_of(live).count():
            raise UsageError(f"no weights to restore below SOURCE: {source}")
        restoration = Restoration(live, options, Tally(live.run_id, source, dest), workers, fail_fast)
        restoration.refuse(problems)
        restoration.drop_up_to_date()
        restoration.run()
        return restoration.finish(time.monotonic() - started)
