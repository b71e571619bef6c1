"""What runs looked at and did not convert, since when, and what of it is acknowledged.

`DEST/_ptbin/unconverted.jsonl` has a line for each file that the last run which looked at it did not convert:
failures with their reason, and files that turned out to be no checkpoints. It is written anew at a run's end;
the lease on DEST keeps two runs from doing so at once. What people acknowledged is in `history.known`.

A failure is *known* if it is acknowledged in this state and with this reason, *old* if it was there before,
else *new*; so a source that changed is new. States are told apart by the source's identity in the listing
(ETag, or time and size). If one of these files is lost, that costs dates and never a weight.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Any, Literal

from ptbin.catalog.finding import OWN_FOLDER
from ptbin.catalog.finished import iter_rows
from ptbin.errors import NotFoundInStoreError, UsageError
from ptbin.history.known import KNOWN, Acknowledgement, read_known, write_known
from ptbin.stores import Where, place_of
from ptbin.values.names import shown_path

UNCONVERTED = f"{OWN_FOLDER}/unconverted.jsonl"
FAILURES = ("rejected", "failed")

Novelty = Literal["new", "old", "known"]


@dataclass(frozen=True, slots=True)
class Unconverted:
    """One file below a SOURCE that was not converted when a run last looked at it.

    Attributes:
        source: its URI, which it is known by.
        path: below SOURCE.
        root: URI of SOURCE.
        state: identity in SOURCE's listing, as `kind:value`; empty where there is none.
        outcome: `rejected`, `failed`, `not_a_checkpoint` or `left_alone`.
        since: when a run first found it in this state with this reason; UTC, ISO 8601.
        run: the id of that run.
    """

    source: str
    path: str
    root: str
    state: str
    outcome: str
    reason: str = ""
    detail: str = ""
    since: str = ""
    run: str = ""

    @property
    def is_failure(self) -> bool:
        return self.outcome in FAILURES

    @property
    def waits_since(self) -> str:
        """When this state of the source was written, where its identity tells; else `since`."""
        return written_at(self.state) or self.since

    def is_same(self, other: Unconverted) -> bool:
        """Whether both are one state of a file, with one reason."""
        return (self.state, self.reason, self.is_failure) == (other.state, other.reason, other.is_failure)

    @classmethod
    def from_json(cls, data: Any) -> Unconverted:
        """Raises ValueError where `data` is not a row."""
        if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
            raise ValueError("not a row")
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError("not a row") from error


@dataclass(slots=True)
class Ledger:
    """One run's view: what was not converted before, what is acknowledged, and what this run adds.

    Attributes:
        before: by source URI.
        root: URI of this run's SOURCE.
        resolved: failures that this run no longer finds; `close` fills it.
    """

    run_id: str = ""
    root: str = ""
    before: Mapping[str, Unconverted] = field(default_factory=dict)
    known: Sequence[Acknowledgement] = ()
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    found: dict[str, Unconverted] = field(default_factory=dict)
    resolved: list[Unconverted] = field(default_factory=list)
    _by_path: dict[str, list[Acknowledgement]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in self.known:
            self._by_path.setdefault(item.path, []).append(item)

    def note(
        self, source: str, path: str, state: str, outcome: str, reason: str = "", detail: str = ""
    ) -> Unconverted:
        """Take in what was not converted; with the date since which that is so."""
        if path == source:  # problems of the listing name nothing but the URI
            path = source.removeprefix(f"{self.root.rstrip('/')}/")
        row = Unconverted(
            source, path, self.root, state, outcome, reason, detail, _utc_text(self.now), self.run_id
        )
        if (earlier := self.before.get(source)) is not None and earlier.is_same(row):
            row = replace(row, since=earlier.since, run=earlier.run)
        self.found[source] = row
        return row

    def seen(self, source: str, state: str) -> Unconverted | None:
        """What an earlier run found of a source in this very state."""
        row = self.before.get(source)
        return row if row is not None and row.state == state else None

    def novelty(self, row: Unconverted) -> Novelty:
        """Whether a failure is known, old or new."""
        if self.acknowledgement(row) is not None:
            return "known"
        earlier = self.before.get(row.source)
        return "old" if earlier is not None and earlier.is_same(row) else "new"

    def acknowledgement(self, row: Unconverted) -> Acknowledgement | None:
        """What acknowledges a failure today."""
        candidates = [*self._by_path.get(row.path, ()), *self._by_path.get(row.source, ())]
        return next((item for item in candidates if item.covers(row, self.now.date())), None)

    def idle(self) -> list[tuple[Acknowledgement, str]]:
        """What is acknowledged without effect, and why: its day is over, or nothing like that fails."""
        failing: dict[str, list[Unconverted]] = {}
        for row in self.before.values():
            if row.is_failure:
                failing.setdefault(row.path, []).append(row)
                failing.setdefault(row.source, []).append(row)
        today = self.now.date()
        found = []
        for item in self.known:
            there = failing.get(item.path, [])
            if item.is_expired(today):
                found.append((item, "its last day is over"))
            elif not any(item.covers(row, today) for row in there):
                found.append((item, "what fails there now is another" if there else "nothing fails there"))
        return found

    def close(self, is_settled: Callable[[Unconverted], bool]) -> list[Unconverted]:
        """At the run's end: every row to be stored. Of the earlier ones that this run did not come upon
        again, those stay of which `is_settled` is false; failures among the others are `resolved`.
        """
        kept = []
        for source, row in self.before.items():
            if source in self.found:
                if row.is_failure and not self.found[source].is_failure:
                    self.resolved.append(row)
            elif not is_settled(row):
                kept.append(row)
            elif row.is_failure:
                self.resolved.append(row)
        return [*kept, *self.found.values()]


def written_at(state: str) -> str:
    """When a file in that state was written, by its identity of kind `mtime`; empty where it has another.

    Such an identity is `<nanoseconds or ISO time>-<size>` (`stores.values.Identity`).
    """
    kind, _, value = state.partition(":")
    text = value.rpartition("-")[0]
    if kind != "mtime" or not text:
        return ""
    try:
        if text.isdecimal():
            return _utc_text(datetime.fromtimestamp(int(text) / 1e9, UTC))
        return _utc_text(datetime.fromisoformat(text))
    except (ValueError, OverflowError, OSError):
        return ""


def _utc_text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# -- the two files -------------------------------------------------------------------------------


def read_ledger(
    dest: Where,
    *,
    run_id: str = "",
    root: str = "",
    now: datetime | None = None,
    there: Collection[str] | None = None,
) -> Ledger:
    """What a run on DEST has to know; two reads, none of a file that a listing (`there`) shows is not there.

    Raises:
        VerificationError: `known.json` is damaged.
        StorageError: the store failed.
    """
    before: dict[str, Unconverted] = {}
    known: list[Acknowledgement] = []
    if there is None or UNCONVERTED in there:
        before = {row.source: row for row in read_unconverted(dest)}
    if there is None or KNOWN in there:
        known = read_known(dest)
    return Ledger(run_id, root, before, known, now or datetime.now(UTC))


def read_unconverted(dest: Where) -> Iterator[Unconverted]:
    """The rows, as far as they can be read: a damaged line is passed over. Memory: a block.

    Raises:
        StorageError: the store failed otherwise than by having no such file.
    """
    try:
        with (place_of(dest) / UNCONVERTED).open_reader() as reader:
            yield from iter_rows(reader.iter_range(0, reader.size), Unconverted.from_json)
    except NotFoundInStoreError:
        return


def write_unconverted(dest: Where, rows: Iterable[Unconverted]) -> None:
    """Put the rows in the place of all that were stored. For the holder of the lease on DEST.

    Raises:
        StorageError: the store failed; what was stored before is still there.
    """
    with (place_of(dest) / UNCONVERTED).open_writer(copies=False) as writer:
        for row in rows:
            facts = {name: value for name, value in asdict(row).items() if value}
            line = {"state": "", **facts}
            writer.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        writer.commit()


def acknowledge(
    dest: Where,
    paths: Sequence[str],
    *,
    because: str,
    until: str,
    today: date,
) -> list[Unconverted]:
    """Acknowledge what fails at `paths` (below SOURCE, or URIs) in DEST; the failures that are covered now.

    Expired acknowledgements are dropped, and of the same path earlier ones.

    Raises:
        UsageError: there is no DEST, or nothing fails at one of them; nothing is written then.
        VerificationError, StorageError: as `read_known`.
    """
    if not place_of(dest).is_directory():
        raise UsageError(f"no destination with runs in it: {dest} is not a directory or prefix")
    names = {path: _names_of(path) for path in paths}
    wanted = {name for each in names.values() for name in each}
    failures = [
        row
        for row in read_unconverted(dest)
        if row.is_failure and not wanted.isdisjoint((row.path, row.source))
    ]
    found = {name for row in failures for name in (row.path, row.source)}
    if missing := [shown_path(path) for path in names if names[path].isdisjoint(found)]:
        raise UsageError(
            f"nothing fails at {', '.join(sorted(missing))} below {dest}, as far as its runs have recorded; "
            "`ptbin status SOURCE DEST` lists what does"
        )
    at = _utc_text(datetime.now(UTC))
    kept = [item for item in read_known(dest) if item.path not in found and not item.is_expired(today)]
    added = [
        Acknowledgement(
            row.path if row.path in wanted else row.source, because, until, row.state, row.reason, at
        )
        for row in failures
    ]
    write_known(dest, [*kept, *added])
    return failures


def _names_of(path: str) -> set[str]:
    """What a failure that is meant by `path` may be called: below SOURCE, by URI, as a shell completes it."""
    names = {shown_path(path), shown_path(path.removeprefix("./"))}
    with contextlib.suppress(UsageError):  # a URI of a store that this installation does not have
        names.add(shown_path(place_of(path).uri))
    return names
