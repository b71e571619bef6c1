"""`ptbin sync`: DEST becomes a mirror of SOURCE, through the Prefect flow."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from flows.cli.destination import refuse_one_file
from flows.cli.plans import print_dry_run
from flows.cli.progress import showing_progress
from flows.cli.shared_options import Shared
from flows.cli.summary import JSON_KEYS, SYNC_KEYS, conversion_lines, tell_summary, untold
from flows.cli.two_places import two_places
from flows.options import SYNC, chosen
from flows.wishes import refuse_secrets

__all__ = ["sync_command"]

EPILOG = """\b
Examples:
  ptbin sync checkpoints/ weights/ --dry-run
  ptbin sync s3://training/runs s3://models/weights
  ptbin sync runs/ mirror/ --delete --max-delete 20 --backup-dir old/2026-11-24
  ptbin sync runs/ mirror/ --include 'figures/**' --exclude 'debug/**'

Checkpoints are converted as `ptbin convert` does; beside them go their companions (configuration, tokenizer,
README, licence, *.json, *.yaml, ...) and what else --include names, as they are. A second run with nothing
changed does nothing. Nothing is deleted unless asked for, never when anything failed, and never what ptbin
did not make of SOURCE.

Exit status: 0 all in step; 1 some were rejected or failed; 2 the call was wrong,
nothing was written; 130 interrupted."""


@two_places("sync", SYNC, EPILOG)
def sync_command(source: str, dest: str, dry_run: bool, **values: Any) -> int:
    """Make DEST a mirror of SOURCE: checkpoints as weights, their companions as they are."""
    asked = chosen(SYNC, values)
    shared = Shared.of(values)
    from flows.requests import sync_request
    from ptbin.catalog.checks import check_mirror
    from ptbin.catalog.dry_run import dry_run as plan_run
    from ptbin.catalog.plan import Plan

    request = sync_request(source, dest, asked)
    # First of all: what refuses the call otherwise may name SOURCE as it was written.
    refuse_secrets(source, dest, *([request.backup_dir] if request.backup_dir else []))
    refuse_one_file(dest, shared.dest_options, "sync")
    sides: dict[str, Any] = {"source_options": shared.source_options, "dest_options": shared.dest_options}
    check_mirror(
        source, dest, delete=request.deletes, backup_dir=request.backup_dir, writes=not dry_run, **sides
    )
    if dry_run:
        with closing(Plan(request, **sides)) as plan:
            return print_dry_run(plan_run(plan), shared)
    from flows.cli.on_prefect import run_prepared
    from ptbin.runs.record import new_run_id

    with showing_progress(shared) as listener:
        summary = run_prepared(request, new_run_id(), shared, listener, source=source, dest=dest, **asked)
    return tell_summary(
        summary, (*JSON_KEYS, *SYNC_KEYS), conversion_lines(untold(summary, listener.told)), shared
    )
