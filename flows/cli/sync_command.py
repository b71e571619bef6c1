"""`ptbin sync`: DEST becomes a mirror of SOURCE, through the Prefect flow."""

from __future__ import annotations

from typing import Any

from flows.cli.carrying_out import carry_out
from flows.cli.command import Shared, command, dry_run_option
from flows.cli.destination import refuse_lost, refuse_one_file
from flows.options import SYNC
from flows.parsing import refuse_secrets

__all__ = ["sync_command"]

EPILOG = """\b
Examples:
  ptbin sync checkpoints/ weights/ --dry-run
  ptbin sync s3://training/runs s3://models/weights
  ptbin sync runs/ mirror/ --delete --max-delete 20 --backup-dir old/2026-11-24
  ptbin sync runs/ mirror/ --include 'figures/**' --exclude 'debug/**'

Checkpoints are converted as `ptbin convert` does; their companions go along (configuration, tokenizer,
README, licence, *.json, *.yaml, ...) and what else --include names, as they are. A second run with nothing
changed does nothing. Nothing is deleted unless asked for, never when anything failed, and never what ptbin
did not make of SOURCE.

Exit status: 0 all in step; 1 some were rejected or failed; 2 the call was wrong,
nothing was written; 130 interrupted."""


@command("sync", ["source", "dest"], (*SYNC, dry_run_option()), EPILOG)
def sync_command(source: str, dest: str, asked: dict[str, Any], shared: Shared) -> int:
    """Make DEST a mirror of SOURCE: checkpoints as weights, their companions as they are."""
    from flows.requests import sync_request

    request = sync_request(source, dest, asked)
    # First of all: what refuses the call otherwise may name SOURCE as it was written.
    refuse_secrets(source, dest, *([request.backup_dir] if request.backup_dir else []))
    refuse_one_file(dest, shared.dest_options, "sync")
    refuse_lost("--backup-dir", request.backup_dir or "")
    return carry_out(request, asked, shared)
