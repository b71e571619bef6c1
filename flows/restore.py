"""The restore flow: every set of weights below SOURCE becomes a proven `.pt` below DEST.

The same run as a conversion's (`flows.conversion`): listing, what is up to date, batches, retries, record.
Only the work of a batch differs, and that it is proven as part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.access import DEFAULT_REQUESTS, Running, RunSettings, join_run, running
from flows.conversion import Conversion, halves
from flows.fanout import Work, unexamined
from flows.parameters import described
from flows.run_record import new_run_id
from flows.runners import RunnerName
from flows.selection import Selection
from flows.tally import Tally
from flows.wishes import MAX_WORKERS, parse_duration, parse_renames, refuse_secrets
from ptbin import RestoreOptions, catalog
from ptbin.catalog import Job, OutputRule
from ptbin.errors import UsageError
from ptbin.options import Naming
from ptbin.restoring.options import SaveAs
from tasks.listing import list_checkpoints, work_of
from tasks.restoring import restore_batch
from tasks.retrying import retry_delay

__all__ = ["restore"]


class Restoration(Conversion):
    """A conversion whose batches restore."""

    artifact_key = "ptbin-restore"

    def __init__(self, run: Running, options: RestoreOptions, tally: Tally, fail_fast: bool) -> None:
        super().__init__(run, options.conversion(), tally, fail_fast)
        self.restore_options = options

    def _convert(self, jobs: Sequence[Job], retry: int = 0, lost: int = 0) -> Work:
        label = self._label(jobs, retry)

        def submit() -> PrefectFuture[Any]:
            return self._submit(restore_batch, label=label, jobs=jobs, options=self.restore_options)

        def then(state: State[Any]) -> Iterable[Work]:
            if self._was_lost(jobs, state, lost):
                yield from (self._convert(part, retry, lost + 1) for part in halves(jobs))
                return
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
@described
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
    train: bool = False,
    select: str | Sequence[str] | None = None,
    strip_prefix: str | None = None,
    rename: Sequence[str] = (),
    naming: Naming = "replace",
    force: bool = False,
    fail_fast: bool = False,
    runner: RunnerName = "threads",
    runner_address: str | None = None,
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] | None = None,
    max_requests: Annotated[int, Field(ge=1)] = DEFAULT_REQUESTS,
    deadline: str | float | None = None,
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
        train=train,
        select=select if isinstance(select, str) else tuple(select or ()),
        strip_prefix=strip_prefix,
        rename=parse_renames(rename),
        force=force,
    )
    refuse_secrets(source, dest)
    settings = RunSettings(
        runner,
        runner_address,
        workers,
        max_requests,
        parse_duration(deadline) if deadline is not None else None,
        source_options,
        dest_options,
    )
    rule = OutputRule(dest, naming, ".pt")
    with join_run(run_id or new_run_id(), source_options, dest_options) as live:
        catalog.check_call(source, dest, source_options=live.source_options, dest_options=live.dest_options)
        with running(live, dest, settings) as run:
            problems = list_checkpoints(
                live.run_id,
                source,
                unexamined(rule),
                unexamined(options.conversion()),
                list(include),
                list(exclude),
                # A model's code may have changed: what it made is never up to date.
                distrust=model is not None,
            )
            if not problems and not work_of(live).count():
                raise UsageError(f"no weights to restore below SOURCE: {source}")
            tally = Tally(live.run_id, source, dest, kind="restore")
            restoration = Restoration(run, options, tally, fail_fast)
            restoration.selection = Selection(tuple(include), tuple(exclude))
            return restoration.carry_out(problems)
