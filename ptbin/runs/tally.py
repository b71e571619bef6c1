"""What a conversion run has come to so far: outcomes in, counts, message and summary out. Pure.

Every checkpoint that was planned ends in exactly one of: converted, up to date, rejected (its own
fault), failed (any other fault), known (either of the two, and acknowledged), not a checkpoint (content that
its place had suggested), left alone (what training leaves next to weights: optimizers, schedulers, ...), not
tried (the run ended before it got to them). The ledger (`ptbin.history.failures`) says what of it
is new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ptbin.catalog import Job, Problem, is_rejection
from ptbin.errors import PtbinError
from ptbin.history.failures import Ledger
from ptbin.runs.outcomes import Converted, Kind, Outcome, one_line
from ptbin.sources.leftovers import is_leftover, leftover_role
from ptbin.stores import identity_text

if TYPE_CHECKING:
    from ptbin.catalog.request import RunRequest
    from ptbin.catalog.worklist import WorkList

MAX_LISTED_ROWS = 1000


@dataclass(slots=True)
class Tally:
    """The outcomes of one run."""

    run_id: str
    source: str
    dest: str
    entries: list[Outcome] = field(default_factory=list)
    """What was worked on; of what was not, the first `MAX_LISTED_ROWS` of each kind."""
    counts: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False
    kind: str = "convert"
    """Of the run: `convert`, `restore`, `sync`, `migrate`."""
    home: str = ""
    """Below which storage URI the run's own files lie, where that is not DEST."""
    files: Counter[str] = field(default_factory=Counter)
    """Of DEST's own files: `deleted`, `backed_up`."""
    deleted: list[str] = field(default_factory=list)
    """Of a mirror, paths below DEST, the first `MAX_LISTED_ROWS`: nothing else records them."""
    kept: int = 0
    """Outputs that are gone from SOURCE and were not deleted."""
    ledger: Ledger = field(default_factory=Ledger)
    """What earlier runs failed at, and what of it is acknowledged."""
    min_success: float | None = None
    """The run succeeds if that share of its checkpoints does; None: all of them."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Entries of SOURCE that were passed over, by kind (`ptbin.catalog.entries`)."""
    run_problems: list[Problem] = field(default_factory=list)
    """Problems of the run itself, such as a run record that could not be written."""

    @classmethod
    def of(cls, run_id: str, request: RunRequest, min_success: float | None = None) -> Tally:
        """That of a run which is asked for this."""
        return cls(run_id, request.source, request.dest, kind=request.kind, min_success=min_success)

    @property
    def place(self) -> str:
        return self.home or self.dest

    def add(self, job: Job, outcome: Outcome) -> Outcome:
        whole = replace(outcome, source=job.source_uri, nbytes=job.source_size)
        return self._append(whole, identity_text(job.identity))

    def add_all(self, jobs: Iterable[Job], kind: Kind) -> None:
        """Jobs that nothing was done about: all count, the first ones are listed (there may be millions)."""
        for job in jobs:
            if self.counts[kind] < MAX_LISTED_ROWS:
                self.entries.append(Outcome(job.path, kind, source=job.source_uri, nbytes=job.source_size))
            self.counts[kind] += 1

    def add_untouched(self, work: WorkList) -> None:
        """What the plan shows to be up to date, and what training leaves next to weights, by its name."""
        self.add_all(work.iter_current(), "up_to_date")
        for job in work.iter_left_alone():
            self.add(job, Outcome(job.path, "left_alone", detail=leftover_role(job.path) or ""))

    def add_rest(self, work: WorkList, settled: Collection[str]) -> None:
        """What the run did not come to; `settled` are the paths of what it did."""
        if len(settled) < work.to_do()[0]:
            left = (job for job in work.iter_to_do() if job.path not in settled)
            self.add_all(left, "not_tried")
        self.add_all(work.iter_to_ask(), "not_tried")  # some, where the asking was cut short

    def add_collisions(self, problems: Iterable[Problem]) -> list[Outcome]:
        entries = []
        for problem in problems:
            kind: Kind = "rejected" if is_rejection(problem.reason) else "failed"
            outcome = Outcome(problem.source, kind, problem.reason, problem.detail, source=problem.source)
            entries.append(self._append(outcome))
        return entries

    def add_run_error(self, error: BaseException) -> None:
        """Something that ended the run itself."""
        reason = error.reason if isinstance(error, PtbinError) else "internal_error"
        detail = one_line(f"{type(error).__name__}: {error}")
        self.run_problems.append(Problem(self.dest, reason, detail))

    def _append(self, entry: Outcome, state: str = "") -> Outcome:
        entry = self._judged(entry, state)
        self.entries.append(entry)
        self.counts[entry.kind] += 1
        return entry

    def _judged(self, entry: Outcome, state: str) -> Outcome:
        """A failure with what the ledger says of it; a known one has its own outcome."""
        failed = entry.kind in {"rejected", "failed"}
        if entry.kind not in {"rejected", "failed", "not_a_checkpoint", "left_alone"}:
            return entry
        if entry.kind == "left_alone" and is_leftover(entry.path):
            return entry  # by its name alone: no run reads it to find that out
        row = self.ledger.note(entry.source, entry.path, state, entry.kind, entry.reason, entry.detail)
        if not failed:
            return entry
        novelty = self.ledger.novelty(row)
        entry = replace(entry, novelty=novelty, since=row.since)
        if (known := self.ledger.acknowledgement(row)) is None:
            return entry
        return replace(entry, kind="known", because=f"{known.because} (until {known.until})")

    def count(self, outcome: str) -> int:
        return self.counts[outcome]

    @property
    def not_listed(self) -> dict[str, int]:
        """By outcome, how many are counted and not listed."""
        listed = Counter[str](entry.kind for entry in self.entries)
        return {outcome: n - listed[outcome] for outcome, n in self.counts.items() if n > listed[outcome]}

    @property
    def is_clean(self) -> bool:
        """Whether nothing went wrong but what is known."""
        return self._is_complete and not self.has_problems

    @property
    def succeeded(self) -> bool:
        """Whether the run counts as one that went well: it is clean, or enough of it is (`min_success`)."""
        enough = self.min_success is not None and self.success_share >= self.min_success
        return self.is_clean or (self._is_complete and enough)

    @property
    def _is_complete(self) -> bool:
        return not (self.count("not_tried") or self.run_problems or self.interrupted)

    @property
    def success_share(self) -> float:
        """Of the checkpoints that were converted, copied, up to date or failed; known ones aside."""
        bad = self.count("rejected") + self.count("failed")
        good = self.count("converted") + self.count("copied") + self.count("up_to_date")
        return good / (good + bad) if good + bad else 1.0

    @property
    def has_problems(self) -> bool:
        return self.counts["rejected"] + self.counts["failed"] > 0

    @property
    def problems(self) -> list[Outcome]:
        """What makes a run fail, new failures first."""
        return sorted(
            (entry for entry in self.entries if entry.kind in {"rejected", "failed"}),
            key=lambda entry: (entry.novelty != "new", entry.path),
        )

    @property
    def known(self) -> list[Outcome]:
        """Failures that are acknowledged."""
        return sorted((e for e in self.entries if e.kind == "known"), key=lambda entry: entry.path)

    def made(self) -> list[tuple[Outcome, Converted]]:
        """What has an output that this run made."""
        return [
            (e, e.converted) for e in self.entries if e.converted is not None and e.converted.manifest_uri
        ]

    def message(self) -> str:
        """The counts as one sentence, for the flow run's state."""
        parts = [
            f"{'migrated' if self.kind == 'migrate' else 'converted'} {self.count('converted')}",
            f"up to date {self.count('up_to_date')}",
            f"rejected {self.count('rejected')}",
            f"failed {self.count('failed')}",
        ]
        if self.kind == "sync":
            parts.insert(1, f"copied {self.count('copied')}")
            parts += [f"{name.replace('_', ' ')} {n}" for name, n in sorted(self.files.items())]
            if self.kept:
                parts.append(f"gone from SOURCE and kept {self.kept}")
        if known := self.count("known"):
            parts.append(f"known failures {known}")
        parts += [f"{what} {count}" for what, count in self._counted() if count]
        parts.extend(f"{problem.reason}: {problem.detail}" for problem in self.run_problems)
        if self.succeeded and not self.is_clean:
            parts.append(f"{self.success_share:.2%} went well, of {self.min_success:.2%} asked for")
        return ("interrupted: " if self.interrupted else "") + ", ".join(parts)

    def _counted(self) -> list[tuple[str, int]]:
        """What the message counts where there is any."""
        return [
            ("not checkpoints", self.count("not_a_checkpoint")),
            ("left alone", self.count("left_alone")),
            ("passed over", self.skipped.total()),
            ("not tried", self.count("not_tried")),
        ]

    def summary(self, seconds: float) -> dict[str, Any]:
        """The `--json` document of `convert`; byte counts are of the checkpoints converted in this run."""
        done = [(entry, entry.converted) for entry in self.entries if entry.converted is not None]
        only: dict[str, Any] = {}
        if self.kind == "sync":
            only = {"copied": self.count("copied"), "kept": self.kept, "deleted_paths": list(self.deleted)}
            only |= {name: self.files[name] for name in ("deleted", "backed_up")}
        elif self.kind == "restore":
            only["initial"] = [
                {"source": entry.source, "names": list(facts.initial)}
                for entry, facts in done
                if facts.initial
            ]
        return {
            "run_id": self.run_id,
            "source": self.source,
            "dest": self.dest,
            "converted": self.count("converted"),
            **only,
            **{name: self.count(name) for name in ("up_to_date", "rejected", "failed", "known")},
            "new": sum(entry.novelty == "new" for entry in self.problems),
            "resolved": len(self.ledger.resolved),
            "left_alone": self.count("left_alone"),
            "skipped": dict(self.skipped),
            "not_tried": self.count("not_tried"),
            "source_bytes": sum(entry.nbytes for entry, _ in done),
            "read_bytes": sum(facts.read_nbytes for _, facts in done),
            "written_bytes": sum(facts.written_nbytes for _, facts in done),
            "copied_bytes": sum(facts.copied_nbytes for _, facts in done),
            "left_out": dict(sum((Counter(facts.left_out) for _, facts in done), Counter[str]())),
            "seconds": round(seconds, 3),
            "manifests": sorted(facts.manifest_uri for _, facts in done if facts.manifest_uri),
            "problems": [entry.problem() for entry in self.problems]
            + [problem.to_json() for problem in self.run_problems],
            "known_problems": [entry.problem() for entry in self.known],
            "resolved_problems": [
                {"source": row.source, "reason": row.reason, "since": row.since}
                for row in self.ledger.resolved[:MAX_LISTED_ROWS]
            ],
        }
