"""`ptbin migrate`: one model registry into another, through the Prefect flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flows.cli.destination import refuse_one_file
from flows.cli.printing import print_json, print_line
from flows.cli.progress import showing_progress
from flows.cli.shared_options import Shared
from flows.cli.summary import MIGRATE_KEYS, mapping_lines, migration_lines, tell_summary, untold
from flows.cli.two_places import two_places
from flows.options import CONTENT, MIGRATE, chosen
from flows.wishes import build_options, refuse_secrets

if TYPE_CHECKING:
    from ptbin.options import ConvertOptions
    from ptbin.registries import ModelPlan, Registry, Step

__all__ = ["migrate_command"]

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
cannot keep (a version's number, say) is told before anything is written. A second run does what is new.

\b
Exit status: 0 all in step; 1 some versions were rejected or failed; 2 the call was
wrong, nothing was written; 130 interrupted."""


@two_places("migrate", MIGRATE, EPILOG, dry_run="Print which version would become which, write nothing.")
def migrate_command(source: str, dest: str, dry_run: bool, **values: Any) -> int:
    """Bring the models of one registry into another, as weights."""
    asked = chosen(MIGRATE, values)
    shared = Shared.of(values)
    options = build_options(chosen(CONTENT, values))
    refuse_secrets(source, dest)
    from ptbin.registries import is_registry_uri
    from ptbin.registries.migration import open_both

    if not is_registry_uri(dest):
        refuse_one_file(dest, shared.dest_options, "migrate")
    here, there = open_both(
        source, dest, asked["source_layout"], asked["layout"], shared.source_options, shared.dest_options
    )
    here.check_readable()
    if dry_run:
        return _print_mapping(
            here, there, asked["include"], asked["exclude"], asked["versions"], options, shared
        )
    from flows.cli.on_prefect import run_flow
    from ptbin.runs.record import new_run_id

    with showing_progress(shared) as listener:
        summary = run_flow(
            "migrate",
            new_run_id(),
            shared,
            listener,
            source=source,
            dest=dest,
            **asked,
        )
    return tell_summary(summary, MIGRATE_KEYS, migration_lines(untold(summary, listener.told)), shared)


def _print_mapping(
    here: Registry,
    there: Registry,
    include: Sequence[str],
    exclude: Sequence[str],
    versions: Any,
    options: ConvertOptions,
    shared: Shared,
) -> int:
    """What a run would do; each version's checkpoints are looked into as a run does before it writes."""
    from ptbin.registries.migration import prepare

    plan = prepare(here, there, include, exclude, versions, options)
    rows = [_row(here, there, step, model, options, shared) for model in plan.models for step in model.steps]
    document: dict[str, Any] = {
        "dry_run": True,
        "source": here.uri,
        "dest": there.uri,
        "versions": rows,
        "not_kept": [
            *plan.never_kept,
            *(f"{model.model.name}: {text}" for model in plan.models for text in model.not_kept),
        ],
        "updates": [model.model.name for model in plan.models if model.needs_update],
        "problems": [
            *(
                {"source": model.model.name, "reason": "registry_error", "detail": model.problem}
                for model in plan.models
                if model.problem and not model.steps
            ),
            *(
                {
                    "source": f"{row['model']}/{row['version']}",
                    "reason": row["reason"],
                    "detail": row["detail"],
                }
                for row in rows
                if row["action"] == "refused"
            ),
        ],
    }
    if shared.as_json:
        print_json(document)
    else:
        for line in mapping_lines(document):
            print_line(line)
    return 1 if document["problems"] else 0


def _row(
    here: Registry,
    there: Registry,
    step: Step,
    plan: ModelPlan,
    options: ConvertOptions,
    shared: Shared,
) -> dict[str, Any]:
    from ptbin.errors import PtbinError
    from ptbin.registries.migration import refuse_files_of_others
    from ptbin.registries.transfer import NoCheckpointError, examine, scratch

    row = step.to_json()
    if step.action != "migrate":
        return row
    try:
        existing = plan.existing
        there.check_place(existing, step.version, step.dest_version)
        refuse_files_of_others(
            there, plan.model.name, plan.beside, shared.source_options, shared.dest_options
        )
        folder = here.folder(step.version)
        with scratch({**shared.source_options, **folder.options}) as (source_options,):
            contents = examine(folder, there.style, options, source_options)
    except NoCheckpointError as error:
        return {**row, "action": "skip", "dest_version": None, "reason": error.reason, "detail": str(error)}
    except PtbinError as error:
        return {
            **row,
            "action": "refused",
            "dest_version": None,
            "reason": error.reason,
            "detail": str(error),
        }
    return {
        **row,
        "replaces": any(old.version == step.dest_version for old in existing.versions),
        "checkpoints": [path for path, *_ in contents.checkpoints],
        "files": len(contents.others),
    } | ({"left_behind": list(contents.left)} if contents.left else {})
