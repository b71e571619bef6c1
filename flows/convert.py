"""The convert flow: every checkpoint below SOURCE becomes a proven output below DEST.

List, pass over what is up to date, cut the rest into batches, write each, prove each, collect, leave a
run record, publish a table, and end in a state whose message counts. One checkpoint's fault never stops
the others. All state that a rerun needs lies in DEST (outputs and their manifests); Prefect's caching is
not used, because it would answer for outputs that are gone.

Costs on Prefect's side: at most about 400 task runs and one artifact, however many checkpoints there are.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from flows.access import RunSettings, join_run, running
from flows.conversion import Conversion
from flows.forms import PLACES, Text
from flows.options import CONVERT
from flows.requests import convert_request
from flows.run_flow import run_flow
from flows.selection import named_files
from flows.wishes import refuse_secrets
from ptbin import catalog
from ptbin.catalog.globs import root_of
from ptbin.runs.record import new_run_id
from ptbin.runs.tally import Tally
from tasks.listing import make_plan, plan_of

__all__ = ["convert"]


@run_flow(PLACES, CONVERT)
def convert(source: Text, dest: Text, **asked: Any) -> Any:
    """Convert every checkpoint below `source` into `dest`.

    `source_options` and `dest_options` name where storage options lie (`block:NAME`, `env:NAME`); `rename`
    takes `OLD=NEW`. Returns its `RunResult`, and ends Completed; where a checkpoint was rejected or failed
    that nobody acknowledged it ends Failed, which raises `RunFailedError` with the same result.
    """
    source, dest = os.fspath(source), os.fspath(dest)
    files_from, retry_failed = asked["files_from"], asked["retry_failed"]
    request = convert_request(source, dest, asked)
    refuse_secrets(source, dest, *([files_from] if isinstance(files_from, str) else []))
    settings = RunSettings.of(asked)
    with join_run(asked["run_id"] or new_run_id(), settings) as live:
        catalog.check_call(source, dest, source_options=live.source_options, dest_options=live.dest_options)
        named = named_files(
            dest,
            root_of(source, live.source_options),
            files_from=files_from,
            retry_failed=retry_failed,
            include=request.include,
            dest_options=live.dest_options,
        )
        request = replace(request, named=tuple(named) if named is not None else None)
        with running(live, request, settings) as run:
            make_plan(live.run_id)
            plan_of(live).refuse_nothing()
            tally = Tally(live.run_id, source, dest, min_success=asked["min_success"])
            return Conversion(run, tally, asked["fail_fast"]).carry_out()
