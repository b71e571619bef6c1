"""The restore flow: every set of weights below SOURCE becomes a proven `.pt` below DEST.

The same run as a conversion's (`flows.conversion`): listing, what is up to date, batches, retries, record.
Only the work of a batch differs, and that it is proven as part of it.
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.access import Running, RunSettings, join_run, running
from flows.conversion import Conversion
from flows.fanout import quote
from flows.forms import PLACES, takes
from flows.options import RESTORE
from flows.run_record import new_run_id
from flows.selection import Selection
from flows.stages import Stage
from flows.tally import Tally
from flows.wishes import MAX_WORKERS, refuse_secrets, restore_options
from ptbin import RestoreOptions, catalog
from ptbin.catalog import OutputRule
from ptbin.errors import UsageError
from tasks.listing import list_checkpoints, work_of
from tasks.restoring import restore_batch

__all__ = ["restore"]


class Restoration(Conversion):
    """A conversion whose batches restore."""

    artifact_key = "ptbin-restore"

    def __init__(self, run: Running, options: RestoreOptions, tally: Tally, fail_fast: bool) -> None:
        super().__init__(run, options.conversion(), tally, fail_fast)
        self.restore_options = options

    def _making(self) -> Stage:
        values = {"options": self.restore_options}
        return Stage(restore_batch, "restore", values, self._settle_all, self._label)


@flow(
    name="restore",
    flow_run_name="{source} to {dest}",
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_WORKERS),  # type: ignore[arg-type]
    persist_result=False,
)
@takes(PLACES, RESTORE)
def restore(source: str, dest: str, **asked: Any) -> State[Any]:
    """Restore every set of weights below `source` into `dest`.

    Ends Completed, or Failed where one was rejected or failed. What is up to date is passed over, unless a
    model is named: its code may have changed.
    """
    options = restore_options(asked)
    include, exclude = list(asked["include"]), list(asked["exclude"])
    refuse_secrets(source, dest)
    settings = RunSettings.of(asked)
    rule = OutputRule(dest, asked["naming"], ".pt")
    with join_run(asked["run_id"] or new_run_id(), settings) as live:
        catalog.check_call(source, dest, source_options=live.source_options, dest_options=live.dest_options)
        with running(live, dest, settings) as run:
            problems = list_checkpoints(
                live.run_id,
                source,
                quote(rule),
                quote(options.conversion()),
                include,
                exclude,
                # A model's code may have changed: what it made is never up to date.
                distrust=options.model is not None,
            )
            if not problems and not work_of(live).count():
                raise UsageError(f"no weights to restore below SOURCE: {source}")
            tally = Tally(live.run_id, source, dest, kind="restore")
            restoration = Restoration(run, options, tally, asked["fail_fast"])
            restoration.selection = Selection(tuple(include), tuple(exclude))
            return restoration.carry_out(problems)
