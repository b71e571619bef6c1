"""How far DEST is in step with SOURCE, without a run: what is due, what fails since when, what is left over.

Uses the plan of a run (`catalog.plan`): the same two listings, the same index of finished work, the same
question to each manifest that the index does not know. What failed comes from `history.failures`.
Nothing is written, no checkpoint is read. Memory: the first `MAX_LISTED` of each kind, and what fails.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime

from ptbin.catalog import Job, Problem
from ptbin.catalog.globs import root_of, split_glob
from ptbin.catalog.plan import Plan
from ptbin.catalog.request import RunKind, RunRequest
from ptbin.catalog.worklist import WorkList
from ptbin.errors import PtbinError
from ptbin.history.failures import Ledger, Unconverted, read_ledger, written_at
from ptbin.history.records import iter_runs
from ptbin.options import ConvertOptions
from ptbin.sources.leftovers import is_leftover
from ptbin.stores import NO_OPTIONS, Sides, identity_text

MAX_LISTED = 1000
RECORDS_READ = 20
"""How far back the options of the last run on SOURCE are looked for."""


@dataclass(slots=True)
class Status:
    """What was found. Lists hold the first `MAX_LISTED` of what is counted.

    Attributes:
        run: the run that was asked what this was asked; empty where none was.
        kind: of the run that would bring both in step.
        counts: by kind. `new`: never converted; `changed`: converted from another state or by other options;
            `failed`, `refused`: as the last run left them, and nothing has changed; `known`: those of them
            that are acknowledged; `orphaned`: outputs whose source is gone.
        listed: by kind, one JSON-able row each.
        oldest: of what is not converted, the path and since when it waits, where that is known.
        idle: what is acknowledged without effect, and why.
    """

    run: str = ""
    kind: str = "convert"
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            (
                *("up_to_date", "new", "changed", "failed", "refused", "known"),
                *("orphaned", "left_alone", "not_checkpoints", "skipped"),
            ),
            0,
        )
    )
    listed: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    oldest: dict[str, str] | None = None
    idle: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_in_step(self) -> bool:
        """Whether nothing is due and nothing fails but what is known."""
        return not any(self.counts[kind] for kind in ("new", "changed", "failed", "refused"))

    def add(self, kind: str, **row: str) -> None:
        self.counts[kind] += 1
        rows = self.listed.setdefault(kind, [])
        if len(rows) < MAX_LISTED:
            rows.append({name: value for name, value in row.items() if value})

    def add_failure(self, ledger: Ledger, row: Unconverted, kind: str) -> None:
        """Count what fails as `kind`, or as `known` where it is acknowledged."""
        facts = {"path": row.path, "reason": row.reason, "detail": row.detail, "since": row.since}
        if (known := ledger.acknowledgement(row)) is not None:
            self.add("known", **facts, because=known.because, until=known.until)
        else:
            self.add(kind, **facts)
            self.waits(row.path, row.waits_since)

    def note_idle(self, ledger: Ledger) -> None:
        """Take in what is acknowledged without effect."""
        self.idle = [
            {"path": item.path, "because": item.because, "until": item.until, "why": why}
            for item, why in ledger.idle()
        ]

    def waits(self, path: str, since: str) -> None:
        if since and (self.oldest is None or since < self.oldest["since"]):
            self.oldest = {"path": path, "since": since}


def last_request(source: str, dest: str, sides: Sides = NO_OPTIONS) -> tuple[RunRequest, str] | None:
    """What the newest run from SOURCE was asked for, and its id; None: not among the last `RECORDS_READ`.

    Runs that looked at named files alone say how, and are passed over for what they looked at.
    """
    place = sides.dest_at(dest)
    if not place.is_directory():
        return None
    root = root_of(source, sides.source_at)
    for run in iter_runs(place, last=RECORDS_READ):
        selection = run.mapping("selection")
        if run.text("kind") not in ("convert", "sync") or not selection or selection.get("is_listed"):
            continue
        try:
            if root_of(run.text("source"), sides.source_at) != root:
                continue
            options = ConvertOptions.from_json(run.mapping("options"))
            kind: RunKind = "sync" if run.text("kind") == "sync" else "convert"
            request = RunRequest(
                source,
                dest,
                options.replace(layout=selection["layout"]),
                kind,
                selection["naming"],
                tuple(selection["include"]),
                tuple(selection["exclude"]),
                tuple(selection["copied"]),
                copy_links=bool(selection.get("copy_links")),
            )
            return request, run.run_id
        except (PtbinError, LookupError, TypeError, ValueError):
            continue  # written by another version, or by hand
    return None


def status_of(
    request: RunRequest, sides: Sides = NO_OPTIONS, *, run: str = "", now: datetime | None = None
) -> Status:
    """Compare the two sides, as a run of that request would; `run`: the id of the one that was asked so.

    Raises:
        UsageError: there is nothing below SOURCE that could be converted.
        VerificationError: the list of what is acknowledged is damaged.
        StorageError: a store failed, or SOURCE does not exist.
    """
    with closing(Plan(request, sides)) as plan:
        plan.make()
        plan.refuse_nothing()
        plan.settle_unknown()
        work = plan.work
        root, pattern = split_glob(request.source, sides.source_at)
        ledger = read_ledger(work.dest, root=root.uri, now=now, there=work.own_files)
        status = Status(run, request.kind)
        status.counts["up_to_date"] = work.count_current()
        status.counts["skipped"] = work.entries.counts.total()
        status.counts["left_alone"] = sum(1 for _ in work.iter_left_alone())
        for job in work.iter_to_do():
            _place(status, work, ledger, job)
        for problem in plan.problems:
            _refuse(status, ledger, problem)
        status.note_idle(ledger)
        # Of a file or a glob it cannot be said what is gone.
        if not request.include and pattern is None and root.is_directory():
            for gone in plan.iter_gone():
                status.add("orphaned", path=gone.output)
    return status


def _place(status: Status, work: WorkList, ledger: Ledger, job: Job) -> None:
    """Count one checkpoint or file that a run would work on."""
    state = identity_text(job.identity)
    if (row := ledger.seen(job.source_uri, state)) is not None:
        if row.is_failure:
            status.add_failure(ledger, row, "failed")
        else:
            status.counts["left_alone" if row.outcome == "left_alone" else "not_checkpoints"] += 1
        return
    if not job.copies and is_leftover(job.path):
        status.counts["left_alone"] += 1
        return
    written = written_at(state)
    status.add("changed" if work.was_made(job) else "new", path=job.path, written=written)
    status.waits(job.path, written)


def _refuse(status: Status, ledger: Ledger, problem: Problem) -> None:
    """Count what the listing refuses: collisions, unsafe names, broken links."""
    row = ledger.before.get(problem.source)
    if row is None or row.reason != problem.reason:
        path = problem.source.removeprefix(f"{ledger.root.rstrip('/')}/")
        row = Unconverted(problem.source, path, ledger.root, "", "rejected", problem.reason, problem.detail)
    status.add_failure(ledger, replace(row, detail=problem.detail), "refused")
