"""How far a registry is in step with another, without a run: what `ptbin status` says of a migration.

The plan of a migration (`registries.migration.prepare`) with what earlier ones failed at. Nothing is written
and no checkpoint is read: the cost is that of listing both sides. For destinations whose runs are recorded in
them, which are directory registries.
"""

from __future__ import annotations

from ptbin.errors import PtbinError, UsageError
from ptbin.history.failures import Ledger, Unconverted, read_ledger
from ptbin.history.records import RecordedRun, iter_runs
from ptbin.history.status import RECORDS_READ, Status
from ptbin.options import ConvertOptions
from ptbin.registries import ModelPlan, is_registry_uri
from ptbin.registries.migration import Registries, prepare
from ptbin.registries.planning import Step
from ptbin.runs.remembering import state_of
from ptbin.stores import NO_OPTIONS, Place, Sides, public_uri


def refuse_registries(source: str, dest: str) -> None:
    """Raises UsageError where DEST is a registry that holds no history of its runs itself."""
    if is_registry_uri(dest):
        raise UsageError(
            f"the history of migrations into {public_uri(dest)} lies where their summary says; what is due: "
            f"ptbin migrate {public_uri(source)} {public_uri(dest)} --dry-run"
        )


def version_status(source: str, dest: str, sides: Sides = NO_OPTIONS) -> Status | None:
    """Compare the two registries as their last recorded migration would again.

    None where the newest run from SOURCE into DEST is another, or none is recorded.

    Raises:
        UsageError: SOURCE has no model of the wanted names.
        VerificationError: the list of what is acknowledged is damaged.
        StorageError: either side failed.
    """
    place = sides.dest_at(dest)
    if (last := _last_migration(source, place)) is None:
        return None
    run, options = last
    asked = run.mapping("selection")
    layouts = asked.get("source_layout"), asked.get("layout")
    here, there = Registries(source, dest, *layouts).open(sides)
    include, exclude = asked.get("include", []), asked.get("exclude", [])
    plan = prepare(here, there, include, exclude, asked.get("versions", "all"), options)
    ledger = read_ledger(place, root=here.uri)
    status = Status(run.run_id, "migrate")
    for model in plan.models:
        if model.problem and not model.steps:
            row = Unconverted("", model.path, here.uri, "", "failed", "registry_error", model.problem)
            status.add_failure(ledger, row, "refused")
        for step in model.steps:
            _place(status, ledger, model, step)
    status.note_idle(ledger)
    return status


def _last_migration(source: str, place: Place) -> tuple[RecordedRun, ConvertOptions] | None:
    """The newest migration from SOURCE, and its options; None where the newest run is another."""
    if not place.is_directory():
        return None
    for run in iter_runs(place, last=RECORDS_READ):
        if run.text("source").rstrip("/") != source.rstrip("/"):
            continue
        if run.text("kind") != "migrate":
            return None
        try:
            return run, ConvertOptions.from_json(run.mapping("options"))
        except (PtbinError, LookupError, TypeError, ValueError):
            continue  # written by another version, or by hand
    return None


def _place(status: Status, ledger: Ledger, model: ModelPlan, step: Step) -> None:
    version = step.version
    state = state_of(version)
    row = ledger.before.get(version.uri)
    if step.action == "up_to_date":
        status.counts["up_to_date"] += 1
    elif step.action == "refused":
        facts = (version.uri, version.path, ledger.root, state, "rejected", step.reason, step.detail)
        found = Unconverted(*facts)
        status.add_failure(ledger, row if row is not None and row.is_same(found) else found, "refused")
    elif row is not None and row.state == state:
        if row.is_failure:
            status.add_failure(ledger, row, "failed")
        else:
            status.counts["not_checkpoints"] += 1
    else:
        origins = {old.origin.version for old in model.existing.versions if old.origin is not None}
        status.add(
            "changed" if version.version in origins else "new", path=version.path, written=version.created
        )
        status.waits(version.path, version.created)
