"""`ptbin migrate`: one model registry into another, through the Prefect flow."""

from __future__ import annotations

from typing import Any

from flows.cli.command import Shared, command, dry_run_option
from flows.cli.destination import refuse_one_file
from flows.cli.plans import print_migration
from flows.cli.progress import showing_progress
from flows.cli.summary import report_run
from flows.options import CONTENT, MIGRATE, chosen
from flows.parsing import build_options, refuse_secrets

EPILOG = """\b
Registries:
  mlflow+http://HOST:PORT       an MLflow server (mlflow+https://...)
  mlflow+sqlite:///PATH.db      the database behind one
  hf://OWNER                    the repositories of a user or organisation on a Hugging Face Hub
  s3://bucket/prefix, a path    a directory registry, see --layout

\b
Examples:
  ptbin migrate mlflow+http://old:5000 mlflow+http://new:5000 --dry-run
  ptbin migrate mlflow+http://old:5000 s3://models/registry --layout hf --versions aliased
  ptbin migrate models/ mlflow+http://new:5000 --source-layout triton --include 'resnet*'

Every checkpoint of a version is converted as `ptbin convert` does, running none of its code; its other files
go along as they are. A version is registered when all of it is there and proven, or not at all. What DEST
cannot keep (a version's number, say) is reported before anything is written. A second run does what is new.

Exit status: 0 all in step; 1 some versions were rejected or failed; 2 the call was
wrong, nothing was written; 130 interrupted."""


DRY_RUN = dry_run_option("Print which version would become which, write nothing.")


@command("migrate", ["source", "dest"], (*MIGRATE, DRY_RUN), EPILOG)
def migrate_command(source: str, dest: str, asked: dict[str, Any], shared: Shared) -> int:
    """Move the models of one registry into another, as weights."""
    options = build_options(chosen(CONTENT, asked))
    refuse_secrets(source, dest)
    from ptbin.registries import is_registry_uri
    from ptbin.registries.migration import Registries

    if not is_registry_uri(dest):
        refuse_one_file(dest, shared.dest_options, "migrate")
    here, there = Registries(source, dest, asked["source_layout"], asked["layout"]).open(shared.sides)
    here.check_readable()
    if asked.pop("dry_run"):
        from ptbin.registries.migration import prepare
        from ptbin.runs.migrating import dry_run as plan_run

        plan = prepare(here, there, asked["include"], asked["exclude"], asked["versions"], options)
        document = plan_run(plan, here, there, options, shared.sides)
        return print_migration(document, shared)
    from flows.cli.on_prefect import run_flow

    with showing_progress(shared) as listener:
        summary = run_flow("migrate", shared, listener, source=source, dest=dest, **asked)
    return report_run("migrate", summary, listener.reported, shared)
