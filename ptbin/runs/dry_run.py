"""What a run would do, without doing it: its plan, and of each job the files that it would touch.

The plan is the run's own (`ptbin.catalog.plan`), and what it refuses is counted by the run's own tally, which
knows the acknowledged failures. A job whose place is free, and whose files' names follow from the options,
costs nothing more. For any other job the first half of the run is done: the index of its source is read, and
each place that it takes is looked at, several jobs side by side. Nothing is written, not even a lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ptbin.catalog.collisions import suffixes_beside
from ptbin.catalog.comparing import change_on_copying, may_replace_copy
from ptbin.catalog.jobs import Job, Problem, problem_of
from ptbin.catalog.plan import WIDTH, Plan, plan_deletions
from ptbin.catalog.request import RunRequest
from ptbin.errors import CheckpointError, OutputExistsError, PtbinError, StorageError
from ptbin.manifests.manifest import MANIFEST_SUFFIX
from ptbin.options import ConvertOptions
from ptbin.preparing import Preview, preview
from ptbin.runs.outcomes import Outcome, outcome_of_job
from ptbin.runs.remembering import CheckpointMemory
from ptbin.runs.tally import Tally
from ptbin.sources.leftovers import is_leftover
from ptbin.stores import NO_OPTIONS, Sides
from ptbin.stores.copying import find_in_place

Look = Callable[[Job], Preview]


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A job that a run would do, and what it would do to the files at its place."""

    job: Job
    files: Preview

    def to_json(self) -> dict[str, Any]:
        """A row of a dry run's document."""
        return {
            "source": self.job.source_uri,
            "dest": self.job.dest_uri,
            "size": self.job.source_size,
            "replaces": bool(self.files.replaces),
            "replaced": list(self.files.replaces),
            "writes": list(self.files.writes),
            "removes": list(self.files.removes),
        }


@dataclass(slots=True)
class DryRun:
    """What a run would do. Paths of `delete`, `keep` and `back_up` are below DEST.

    Attributes:
        jobs: what it would convert, restore or copy.
        left_alone: what training leaves next to weights.
        not_checkpoints: files that only their place, or a content that was looked at, could have made one.
        problems: what it would refuse, as far as that is known before the weights are read; `known`: those of
            them that are acknowledged.
        skipped: entries of SOURCE that the listing passes over, by kind.
        links: names of links that it does not follow, in words.
    """

    request: RunRequest
    tally: Tally = field(init=False)
    jobs: list[PlannedJob] = field(default_factory=list)
    up_to_date: list[Job] = field(default_factory=list)
    left_alone: list[Job] = field(default_factory=list)
    not_checkpoints: list[Job] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    known: list[Problem] = field(default_factory=list)
    delete: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    back_up: tuple[str, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    links: str = ""

    def __post_init__(self) -> None:
        self.tally = Tally.of("", self.request)

    def add_refused(self, job: Job, problem: Problem) -> None:
        """A job that the plan itself refuses."""
        outcome = Outcome(job.path, "failed", problem.reason, problem.detail)
        self._add(problem, self.tally.add(job, outcome))

    def add_failed(self, job: Job, error: Exception) -> None:
        """A job that the run would reject, or pass over."""
        entry = self.tally.add(job, outcome_of_job(job, error))
        if entry.kind == "left_alone":
            self.left_alone.append(job)
        elif entry.kind == "not_a_checkpoint":
            self.not_checkpoints.append(job)
        else:
            self._add(problem_of(job.source_uri, error), entry)

    def add_unplanned(self, problems: Sequence[Problem]) -> None:
        """What the listing alone refuses."""
        for problem, entry in zip(problems, self.tally.add_collisions(problems), strict=True):
            self._add(problem, entry)

    def _add(self, problem: Problem, entry: Outcome) -> None:
        (self.known if entry.kind == "known" else self.problems).append(problem)

    def to_json(self) -> dict[str, Any]:
        """The document of `--dry-run --json`."""
        made = [item.to_json() for item in self.jobs if not item.job.copies]
        verb = "restore" if self.request.kind == "restore" else "convert"
        document: dict[str, Any] = {"dry_run": True, verb: made}
        if self.request.kind == "sync":
            document |= {
                "copy": [item.to_json() for item in self.jobs if item.job.copies],
                "up_to_date": len(self.up_to_date),
                "delete": list(self.delete),
                "keep": list(self.keep),
                "back_up": list(self.back_up),
            }
        else:
            document["up_to_date"] = [job.source_uri for job in self.up_to_date]
        return document | {
            "left_alone": [job.source_uri for job in self.left_alone],
            "not_checkpoints": [job.source_uri for job in self.not_checkpoints],
            "skipped": dict(self.skipped),
            "problems": [problem.to_json() for problem in self.problems],
            "known_problems": [problem.to_json() for problem in self.known],
        }


def dry_run(plan: Plan, look: Look | None = None) -> DryRun:
    """Make the plan, and find out what the run would do to each file.

    `look` says what a job would do, and raises where it would refuse to; left out, `preview_job`.

    Raises:
        UsageError: there is nothing below SOURCE. StorageError: a store failed.
    """
    request, work = plan.request, plan.work
    plan.make()
    plan.refuse_nothing()
    plan.settle_unknown()
    if request.compares:
        plan.compare_all()
    found = DryRun(request, skipped=dict(work.entries.counts), links=work.entries.links_words())
    try:
        CheckpointMemory(plan).open(found.tally)
    except PtbinError as error:
        found.problems.append(problem_of(request.dest, error))
    found.add_unplanned(plan.problems)
    for job, problem in plan.hold_back():
        found.add_refused(job, problem)
    owners, refused = plan.backups()
    for job, problem in refused:
        found.add_refused(job, problem)
    plan_jobs(_by_path(work.iter_to_do()), request.making, look or _looking(plan), found)
    found.up_to_date += _by_path(work.iter_current())
    found.left_alone += work.iter_left_alone()
    found.left_alone = _by_path(found.left_alone)
    deletions = plan_deletions(
        list(plan.iter_gone()) if request.deletes else [],
        is_clean=not found.problems,
        most=request.max_delete,
    )
    if deletions.problem:
        found.problems.append(Problem(request.dest, "max_delete", deletions.problem))
    found.delete, found.keep = deletions.files, tuple(item.output for item in deletions.kept)
    if request.backup_dir is not None:
        found.back_up = (*sorted(owners), *deletions.files)
    return found


def plan_jobs(jobs: Iterable[Job], options: ConvertOptions, look: Look, found: DryRun) -> None:
    """Sort jobs by what would become of each, in their order."""

    def planned(job: Job) -> Preview | Exception:
        if not _needs_look(job, options):
            return Preview(_names_of(job, options))
        try:
            return look(job)
        except (CheckpointError, OutputExistsError, StorageError) as error:
            return error

    jobs = list(jobs)
    with ThreadPoolExecutor(WIDTH) as pool:
        for job, files in zip(jobs, pool.map(planned, jobs), strict=True):
            if isinstance(files, Preview):
                found.jobs.append(PlannedJob(job, files))
            else:
                found.add_failed(job, files)


def _needs_look(job: Job, options: ConvertOptions) -> bool:
    """Whether a listing does not tell which files the job writes: of a candidate that may not be a checkpoint
    none, and parts, shards and sidecars are called as its content says.
    """
    standing = job.standing
    if standing is None or standing.size is not None:
        return True
    if job.copies:
        return False
    by_content = options.split or options.max_shard_size is not None or options.layout == "hf"
    return by_content or not standing.alone or not job.certain or is_leftover(job.path)


def _names_of(job: Job, options: ConvertOptions) -> tuple[str, ...]:
    name = job.output_name
    if job.copies:
        return (name,)
    return (name, *(name + suffix for suffix in suffixes_beside(options)), name + MANIFEST_SUFFIX)


def _looking(plan: Plan) -> Look:
    making = plan.request.making
    return lambda job: preview_job(job, making, plan.sides, damaged=plan.damaged.get(job.dest_uri))


def preview_job(
    job: Job,
    options: ConvertOptions,
    sides: Sides = NO_OPTIONS,
    *,
    damaged: Mapping[str, Any] | None = None,
) -> Preview:
    """What a conversion or a copy would do. Raises as `conversion.preview`."""
    source, dest = sides.source_at(job.source_uri), sides.dest_at(job.dest_uri)
    if not job.copies:
        return preview(source, dest, options, standing=job.standing, damaged=damaged)
    same = find_in_place(
        source,
        dest,
        may_replace_copy(job, options) or (lambda _: True),
        change=change_on_copying(job.source_uri, job.output_name, options, size=job.source_size),
    )
    return Preview((dest.name,), (dest.name,)) if same is None else Preview()


def _by_path(jobs: Iterable[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: job.path)
