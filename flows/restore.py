"""The restore flow: every set of weights below SOURCE becomes a proven `.pt` below DEST.

The same run as a conversion's (`flows.conversion`): listing, what is up to date, batches, retries, record.
Only the work of a batch differs, and that it is proven as part of it.
"""

from __future__ import annotations

import os
from typing import Any

from flows.access import Running, RunSettings, join_run, running
from flows.conversion import Conversion
from flows.forms import PLACES, Text
from flows.options import RESTORE
from flows.requests import restore_request
from flows.run_flow import run_flow
from flows.stages import Stage
from flows.wishes import refuse_secrets, restore_options
from ptbin import RestoreOptions, catalog
from ptbin.runs.record import new_run_id
from ptbin.runs.tally import Tally
from tasks.listing import make_plan, plan_of
from tasks.restoring import restore_batch

__all__ = ["restore"]


class Restoration(Conversion):
    """A conversion whose batches restore."""

    artifact_key = "ptbin-restore"

    def __init__(self, run: Running, options: RestoreOptions, tally: Tally, fail_fast: bool) -> None:
        super().__init__(run, tally, fail_fast)
        self.restore_options = options

    def _making(self) -> Stage:
        values = {"options": self.restore_options}
        return Stage(restore_batch, "restore", values, self._settle_all, self._label)


@run_flow(PLACES, RESTORE)
def restore(source: Text, dest: Text, **asked: Any) -> Any:
    """Restore every set of weights below `source` into `dest`.

    Returns its `RunResult`; ends Failed (`RunFailedError`) where one was rejected or failed. What is up to
    date is passed over, unless a model is named: its code may have changed.
    """
    source, dest = os.fspath(source), os.fspath(dest)
    options = restore_options(asked)
    request = restore_request(source, dest, asked, options)
    refuse_secrets(source, dest)
    settings = RunSettings.of(asked)
    with join_run(asked["run_id"] or new_run_id(), settings) as live:
        catalog.check_call(source, dest, source_options=live.source_options, dest_options=live.dest_options)
        with running(live, request, settings) as run:
            make_plan(live.run_id)
            plan_of(live).refuse_nothing()
            tally = Tally(live.run_id, source, dest, kind="restore")
            return Restoration(run, options, tally, asked["fail_fast"]).carry_out()
