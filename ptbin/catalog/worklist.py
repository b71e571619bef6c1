"""A whole run's work, planned in a temporary database: millions of checkpoints cost disk, not memory.

`plan` lists DEST once and SOURCE once, decides for each checkpoint where its output goes, whether two
collide, and whether it is done already, by the index of finished work. What the index does not know is left
to be asked, one manifest each. The work is handed out largest first.

Costs: two listings and the segments of the index. The database lies in the system's temporary folder and
vanishes with the list. One instance may be used by several threads.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ptbin.catalog.finding import SHARD_NUMBER, find_checkpoints, is_in_own_folder
from ptbin.catalog.finished import (
    INDEX_FOLDER,
    SEGMENT_SUFFIX,
    FinishedRow,
    digest_of,
    identity_text,
    iter_segment,
)
from ptbin.catalog.jobs import Found, Job, Problem
from ptbin.catalog.mirroring import is_doubtful, is_sidecar
from ptbin.catalog.planning import OutputRule, settle_collision
from ptbin.errors import (
    LimitExceededError,
    NotFoundInStoreError,
    OutputCollisionError,
    StorageError,
    VerificationError,
)
from ptbin.folders import INDEX_SUFFIX
from ptbin.manifest import MANIFEST_SUFFIX, parse_manifest
from ptbin.options import ConvertOptions
from ptbin.provenance import STATEMENT_SUFFIX
from ptbin.stores import Identity, ListedObject, open_store

__all__ = ["WorkList"]

_TO_DO, _CURRENT, _TO_ASK, _REFUSED = range(4)
JOINT_KIND = "parts"
"""Of identities of several files together (`stores.joined.joint_identity`)."""
PAGE = 1000
"""Rows held at once while the list is read."""

_TABLES = """
CREATE TABLE stored (path TEXT PRIMARY KEY, size INTEGER, identity TEXT) WITHOUT ROWID;
CREATE TABLE finished (manifest TEXT, digest TEXT, row TEXT, PRIMARY KEY (manifest, digest)) WITHOUT ROWID;
CREATE TABLE sidecars (folder TEXT, job INTEGER);
CREATE TABLE segments (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE jobs (id INTEGER PRIMARY KEY, place TEXT, output TEXT, path TEXT, uri TEXT, size INTEGER,
    kind TEXT, value TEXT, certain INTEGER, copies INTEGER, state INTEGER);
"""


class WorkList:
    """Made empty; `plan` fills it, once."""

    def __init__(self, dest: str, *, dest_options: Mapping[str, Any] | None = None) -> None:
        self.dest = dest
        self._dest_options = dest_options
        self._lock = threading.RLock()
        self._file = tempfile.NamedTemporaryFile(prefix="ptbin-work-", suffix=".sqlite")  # noqa: SIM115
        self._db = sqlite3.connect(self._file.name, check_same_thread=False, isolation_level=None)
        # Nothing of it is worth keeping after a crash.
        self._db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16384;" + _TABLES
        )
        self._rule = OutputRule(dest)
        self._options = ConvertOptions()
        self._source_options: Mapping[str, Any] | None = None

    @property
    def rule(self) -> OutputRule:
        """How outputs are named in this run."""
        return self._rule

    def close(self) -> None:
        with self._lock:
            self._db.close()
            self._file.close()

    # -- planning --------------------------------------------------------------------------------

    def plan(
        self,
        source: str,
        rule: OutputRule,
        options: ConvertOptions,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        source_options: Mapping[str, Any] | None = None,
        tick: Callable[[], object] = lambda: None,
        copies: Callable[[ListedObject], bool] | None = None,
        distrust: bool = False,
    ) -> list[Problem]:
        """Fill the list; what cannot be done at all. `tick` is called now and then, and may raise.

        With `options.force` nothing is up to date, and DEST is not looked at; with `distrust` it is looked
        at, and everything is to be done that is not compared by its content. `copies` says which files go
        along as they are.

        Raises:
            NotFoundInStoreError, StorageError: from the stores.
        """
        with self._lock:
            self._clear()
            self._rule = rule
            self._options, self._source_options = options, source_options
            if not options.force:
                self._read_dest(tick)
            others: list[ListedObject] = []
            broken: list[str] = []
            found = find_checkpoints(
                source,
                include=include,
                exclude=exclude,
                storage_options=source_options,
                is_other=copies or (lambda _: False),
                other=others.append,
                broken=broken.append if copies is not None else None,
            )
            problems = self._add(found, others, tick)
            problems += [_broken_link(link) for link in broken]
            problems += self._settle_collisions()
            if not options.force and not distrust:
                self._look_up(options, tick)
            return problems

    def _clear(self) -> None:
        for table in ("stored", "finished", "segments", "jobs", "sidecars"):
            self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - names from the line above

    def _read_dest(self, tick: Callable[[], object]) -> None:
        store, path = open_store(self.dest, self._dest_options)
        self._db.execute("BEGIN")
        for number, item in enumerate(store.iter_objects(path)):
            if number % PAGE == 0:
                tick()
            if not is_in_own_folder(item.path):
                row = (item.path, item.size, identity_text(item.identity))
                self._db.execute("INSERT OR REPLACE INTO stored VALUES (?, ?, ?)", row)
            elif item.path.startswith(f"{INDEX_FOLDER}/") and item.path.endswith(SEGMENT_SUFFIX):
                self._db.execute("INSERT OR REPLACE INTO segments VALUES (?)", (item.path,))
        self._db.execute("COMMIT")
        for (segment,) in self._db.execute("SELECT path FROM segments ORDER BY path").fetchall():
            tick()
            self.learn(iter_segment(store, f"{path.rstrip('/')}/{segment}"))

    def learn(self, rows: Iterable[FinishedRow]) -> None:
        """Take rows of the index in, those that speak of what DEST's listing shows."""
        with self._lock:
            self._db.execute("BEGIN")
            for row in rows:
                known = self._db.execute("SELECT identity FROM stored WHERE path = ?", (row.manifest,))
                if (found := known.fetchone()) is not None and found[0] and found[0] == row.identity:
                    values = (row.manifest, row.digest, _dump(row))
                    self._db.execute("INSERT OR REPLACE INTO finished VALUES (?, ?, ?)", values)
            self._db.execute("COMMIT")

    def _add(
        self, found: Iterable[Found], others: list[ListedObject], tick: Callable[[], object]
    ) -> list[Problem]:
        """`others` fills while `found` is read, and is emptied here."""
        problems = []
        self._db.execute("BEGIN")
        for number, job in enumerate(self._jobs(found, others)):
            if number % PAGE == 0:
                tick()
            if isinstance(job, Problem):
                problems.append(job)
                continue
            self._insert(job)
        self._db.execute("COMMIT")
        self._db.execute("CREATE INDEX IF NOT EXISTS places ON jobs (place)")
        self._put_sidecars_beside_weights()
        return problems

    def _insert(self, job: Job) -> None:
        kind, value = (job.identity.kind, job.identity.value) if job.identity else (None, None)
        cursor = self._db.execute(
            "INSERT INTO jobs (place, output, path, uri, size, kind, value, certain, copies, state) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self._rule.place_of(job),
                self._rule.relative(job),
                job.path,
                job.source_uri,
                job.source_size,
                kind,
                value,
                job.certain,
                job.copies,
                _TO_DO,
            ),
        )
        folder, _, name = job.path.rpartition("/")
        if job.copies and self._rule.layout == "hf" and is_sidecar(name):
            self._db.execute("INSERT INTO sidecars VALUES (?, ?)", (folder, cursor.lastrowid))

    def _put_sidecars_beside_weights(self) -> None:
        """Where layout `hf` gives weights a folder of their own, configuration and tokenizer go there too.

        As copies of their own: no conversion takes them along, so an edited `config.json` costs one copy.
        """
        if self._db.execute("SELECT 1 FROM sidecars").fetchone() is None:
            return
        self._db.execute("CREATE INDEX IF NOT EXISTS folders ON sidecars (folder)")
        self._db.execute("BEGIN")
        for _, weights in self._select("NOT copies", ()):
            if _is_folder(weights):
                continue  # its companions lie in it, and go to the same place anyhow
            output = self._rule.relative(weights)
            beside = "id IN (SELECT job FROM sidecars WHERE folder = ?)"
            for _, job in list(self._select(beside, (weights.path.rpartition("/")[0],))):
                path = self._rule.beside_weights(job.path, output)
                place = path.casefold() if path is not None else ""
                if (
                    path is None
                    or self._db.execute("SELECT 1 FROM jobs WHERE place = ?", (place,)).fetchone()
                ):
                    continue
                self._insert(replace(job, dest_uri=f"{self._rule.base}/{path}"))
        self._db.execute("COMMIT")

    def _jobs(self, found: Iterable[Found], others: list[ListedObject]) -> Iterator[Job | Problem]:
        for item in found:
            yield self._rule.apply(item)
            yield from self._copies(others)
        yield from self._copies(others)

    def _copies(self, others: list[ListedObject]) -> Iterator[Job | Problem]:
        while others:
            item = others.pop(0)
            made = self._rule.apply(Found(item.path, item.uri, item.size, item.identity, True))
            if is_doubtful(item) and (isinstance(made, Problem) or self._converts(made)):
                yield made
            else:
                yield self._rule.copy(item)

    def _converts(self, job: Job) -> bool:
        """Whether a file that is to go along as it is, by its name a checkpoint, is one; as it was known."""
        copy = replace(job, dest_uri=f"{self._rule.base}/{job.path}", copies=True)
        for kind in (job, copy):
            digest = digest_of(kind, self._options)
            if any(row.digest == digest for row in self.rows_of(self.relative_manifest(kind))):
                return not kind.copies
        from ptbin.comparing import is_convertible  # reads checkpoints: nobody else here does

        return is_convertible(job.source_uri, self._options, source_options=self._source_options)

    def _settle_collisions(self) -> list[Problem]:
        problems = []
        shared = "SELECT place FROM jobs GROUP BY place HAVING count(*) > 1"
        for (place,) in self._db.execute(shared).fetchall():
            same = list(self._select("place = ?", (place,)))
            wins, refused = settle_collision([job for _, job in same])
            problems += refused
            losers = [(_REFUSED, number) for number, job in same if job not in wins]
            self._db.executemany("UPDATE jobs SET state = ? WHERE id = ?", losers)
        return problems + self._refuse_beside() + self._refuse_shards()

    def _refuse_beside(self) -> list[Problem]:
        """Copies that would go where an output's index or statement goes."""
        problems = []
        for suffix in self._extra_suffixes():
            shared = (
                "SELECT copied.id, made.path "
                "FROM jobs made JOIN jobs copied ON copied.place = made.place || ? "
                "WHERE copied.copies AND NOT made.copies AND made.certain "
                "AND copied.state != ? AND made.state != ?"
            )
            for number, path in self._db.execute(shared, (suffix, _REFUSED, _REFUSED)).fetchall():
                problems.append(self._refuse_for(number, f"a file of the output of {path}"))
        return problems

    def _refuse_shards(self) -> list[Problem]:
        """Files that would go where a shard of another output may go, and those others."""
        if self._options.max_shard_size is None:
            return []
        refused: dict[int, str] = {}
        query = (
            "SELECT id, place, path, copies FROM jobs WHERE place LIKE '%-of-%' AND certain AND state != ?"
        )
        for number, place, path, copies in self._db.execute(query, (_REFUSED,)).fetchall():
            whole = SHARD_NUMBER.sub("", place)
            if whole == place:
                continue
            query = "SELECT id, path FROM jobs WHERE place = ? AND NOT copies AND certain AND state != ?"
            for other, its_path in self._db.execute(query, (whole, _REFUSED)).fetchall():
                refused[number] = f"a shard of the output of {its_path}"
                if not copies:
                    refused[other] = f"the output of {path}, under the name of one of its shards"
        return [self._refuse_for(number, what) for number, what in refused.items()]

    def _refuse_for(self, number: int, what: str) -> Problem:
        ((_, job),) = self._select("id = ?", (number,))
        self._db.execute("UPDATE jobs SET state = ? WHERE id = ?", (_REFUSED, number))
        advice = "leave one out with --exclude" + ("" if job.copies else ", or use --naming append")
        detail = f"{job.path} is to go to {job.dest_uri}, which is in the way of {what}; {advice}"
        return Problem(job.source_uri, OutputCollisionError.reason, detail)

    def _look_up(self, options: ConvertOptions, tick: Callable[[], object]) -> None:
        """Decide by the index; where a manifest is there that it does not know, that is to be asked."""
        self._db.execute("BEGIN")
        for number, (job_id, job) in enumerate(self._select("state = ?", (_TO_DO,))):
            if number % PAGE == 0:
                tick()
            manifest = self.relative_manifest(job)
            if known := self.rows_of(manifest):
                state = _CURRENT if any(self._is_current(row, job, options) for row in known) else _TO_DO
            elif job.identity is not None and self._size_of(manifest) is not None:
                state = _TO_ASK
            else:
                continue
            self._db.execute("UPDATE jobs SET state = ? WHERE id = ?", (state, job_id))
        self._db.execute("COMMIT")

    def rows_of(self, manifest: str) -> list[FinishedRow]:
        """What is known of the stored state of a manifest or a copy. All of it is true: a copy that was only
        touched at its source, say, is one state in DEST made of two states of SOURCE.
        """
        with self._lock:
            found = self._db.execute("SELECT row FROM finished WHERE manifest = ?", (manifest,)).fetchall()
        return [_load(text) for (text,) in found]

    def _is_current(self, row: FinishedRow, job: Job, options: ConvertOptions) -> bool:
        return row.is_enough(options) and self._is_of(row, job, options)

    def _is_of(self, row: FinishedRow, job: Job, options: ConvertOptions) -> bool:
        if job.identity is None or row.digest != digest_of(job, options):
            return False
        folder = row.manifest[: -len(row.manifest.rsplit("/", 1)[-1])]
        return all(self._size_of(folder + name) == size for name, size in row.outputs)

    def _size_of(self, path: str) -> int | None:
        found = self._db.execute("SELECT size FROM stored WHERE path = ?", (path,)).fetchone()
        return None if found is None else int(found[0])

    # -- what was planned ------------------------------------------------------------------------

    def _select(self, where: str, values: tuple[Any, ...], order: str = "id") -> Iterator[tuple[int, Job]]:
        """Jobs with their numbers, a page at a time: the list may change between two pages."""
        query = (
            "SELECT id, output, path, uri, size, kind, value, certain, copies FROM jobs "  # noqa: S608 - our own
            f"WHERE {where} ORDER BY {order}"
        )
        with self._lock:
            cursor = self._db.execute(query, values)
        while True:
            with self._lock:
                page = cursor.fetchmany(PAGE)
            if not page:
                return
            for number, output, path, uri, size, kind, value, certain, copies in page:
                identity = Identity(kind, value) if kind is not None else None
                place = f"{self._rule.base}/{output}"
                yield number, Job(uri, size, place, path, bool(certain), identity, bool(copies))

    def count(self) -> int:
        """Checkpoints that the listing came to, collisions aside."""
        return self._number("SELECT count(*) FROM jobs WHERE state != ?", _REFUSED)

    def count_current(self) -> int:
        return self._number("SELECT count(*) FROM jobs WHERE state = ?", _CURRENT)

    def to_do(self, *, copies: bool | None = None) -> tuple[int, int]:
        """How many are to be done, and their bytes; only conversions or copies where that is asked."""
        only = "" if copies is None else f" AND copies = {copies:d}"
        return (
            self._number(f"SELECT count(*) FROM jobs WHERE state = ?{only}", _TO_DO),  # noqa: S608 - our own
            self._number(f"SELECT coalesce(sum(size), 0) FROM jobs WHERE state = ?{only}", _TO_DO),  # noqa: S608
        )

    def count_to_ask(self) -> int:
        return self._number("SELECT count(*) FROM jobs WHERE state = ?", _TO_ASK)

    def _number(self, query: str, state: int) -> int:
        with self._lock:
            return int(self._db.execute(query, (state,)).fetchone()[0])

    def iter_to_do(self, *, copies: bool | None = None) -> Iterator[Job]:
        """What is to be done, largest first; only conversions or copies where that is asked."""
        only = "" if copies is None else f" AND copies = {copies:d}"
        return (job for _, job in self._select(f"state = ?{only}", (_TO_DO,), "size DESC, id"))

    def iter_current(self) -> Iterator[Job]:
        return (job for _, job in self._select("state = ?", (_CURRENT,)))

    def iter_to_ask(self) -> Iterator[Job]:
        """Those with a manifest that the index does not know; `answer` settles them."""
        return (job for _, job in self._select("state = ?", (_TO_ASK,)))

    def relative_manifest(self, job: Job) -> str:
        """Path below DEST of the job's manifest; of a copy, its own, for that has none."""
        return self._rule.relative(job) + ("" if job.copies else MANIFEST_SUFFIX)

    def answer(
        self, jobs: Sequence[Job], rows: Iterable[FinishedRow], options: ConvertOptions
    ) -> list[FinishedRow]:
        """What the manifests of those jobs say; returns the rows that belong into the index."""
        with self._lock:
            rows = list(rows)
            self.learn(rows)
            kept = []
            for job in jobs:
                known = self.rows_of(self.relative_manifest(job))
                current = any(self._is_current(row, job, options) for row in known)
                kept.extend(known)
                self._db.execute(
                    "UPDATE jobs SET state = ? WHERE place = ? AND state = ?",
                    (_CURRENT if current else _TO_DO, self._rule.place_of(job), _TO_ASK),
                )
            return kept

    def copies_listed(self, job: Job) -> list[str]:
        """Names that the manifest of an output lists, and that this run copies by themselves.

        Raises:
            StorageError: the manifest could not be read.
        """
        manifest = self.relative_manifest(job)
        folder = manifest[: -len(manifest.rsplit("/", 1)[-1])]
        query = "SELECT 1 FROM jobs WHERE place = ? AND copies"
        with self._lock:
            return [
                name
                for name in dict.fromkeys(self._outputs_before(manifest))
                if self._db.execute(query, ((folder + name).casefold(),)).fetchone()
            ]

    def is_planned(self, path: str) -> bool:
        """Whether this run would write a file at `path` below DEST: an output, a shard, a manifest."""
        if is_in_own_folder(path) or not path.rpartition("/")[2]:  # the latter: a probe of `check_writable`
            return True
        names = {path.removesuffix(MANIFEST_SUFFIX).removesuffix(INDEX_SUFFIX)}
        names |= {SHARD_NUMBER.sub("", name) for name in names}
        with self._lock:
            return any(
                self._db.execute("SELECT 1 FROM jobs WHERE place = ?", (name.casefold(),)).fetchone()
                for name in names
            )

    def discard_unfinished(self) -> int:
        """Remove what killed writers of these outputs left in DEST, which this run has to itself; how many.

        Raises:
            StorageError: the store failed.
        """
        store, path = open_store(self.dest, self._dest_options)
        return store.discard_unfinished(path, self.is_planned)

    # -- what was there before -------------------------------------------------------------------

    def present(self, job: Job) -> list[str]:
        """Paths below DEST of what this job would write over, as the listing shows them.

        Where the index does not know the output, its manifest is read.

        Raises:
            StorageError: it could not be read.
        """
        key, output = self.relative_manifest(job), self._rule.relative(job)
        named = [output, key]
        if not job.copies:
            folder = key[: -len(key.rsplit("/", 1)[-1])]
            named += [output + suffix for suffix in self._extra_suffixes()]
            named += [folder + name for name in self._outputs_before(key)]
            named += self._shards_of(output)
        return [path for path in dict.fromkeys(named) if self._size_of(path) is not None]

    def _outputs_before(self, manifest: str) -> list[str]:
        """Names of the files that a stored manifest lists."""
        if rows := self.rows_of(manifest):
            return [name for row in rows for name, _ in row.outputs]
        if self._size_of(manifest) is None:
            return []
        store, path = open_store(self.dest, self._dest_options)
        try:
            found = parse_manifest(store.read_bytes(f"{path.rstrip('/')}/{manifest}"), manifest)
        except (NotFoundInStoreError, VerificationError, LimitExceededError):
            return []
        return [output["path"] for output in found["outputs"]]

    def _shards_of(self, output: str) -> list[str]:
        """What is stored under names that shards of this output may get."""
        if self._options.max_shard_size is None:
            return []
        stem = output.rpartition(".")[0]
        # A point follows a dash in Unicode: the range is everything that begins with the stem and a dash.
        query = "SELECT path FROM stored WHERE path > ? AND path < ?"
        with self._lock:
            found = self._db.execute(query, (f"{stem}-", f"{stem}.")).fetchall()
        return [path for (path,) in found if SHARD_NUMBER.sub("", path) == output]

    def _extra_suffixes(self) -> list[str]:
        """Of the files that lie beside an output with these options, known before it is made."""
        options = self._options
        index = [INDEX_SUFFIX] if options.format == "raw" or options.max_shard_size is not None else []
        return index + ([STATEMENT_SUFFIX] if options.provenance else [])

    def iter_unexplained(self) -> Iterator[str]:
        """Paths below DEST of the manifests, and the copies that the index knows, of no job of this run."""
        query = "SELECT manifest FROM finished UNION SELECT path FROM stored WHERE path LIKE ?"
        with self._lock:
            cursor = self._db.execute(query, ("%" + MANIFEST_SUFFIX,))
        while True:
            with self._lock:
                page = cursor.fetchmany(PAGE)
            if not page:
                return
            yield from (path for (path,) in page if not self._is_explained(path))

    def _is_explained(self, path: str) -> bool:
        """Whether a job of this run has that manifest, or is that copy. Names that differ in case do not."""
        place = path.removesuffix(MANIFEST_SUFFIX)
        with self._lock:
            found = self._db.execute(
                "SELECT output, copies FROM jobs WHERE place = ?", (place.casefold(),)
            ).fetchall()
        return any(output + ("" if copies else MANIFEST_SUFFIX) == path for output, copies in found)

    def is_only_unproven(self, job: Job) -> bool:
        """Whether a job is to be done for a stronger proof alone: its output would come out the same."""
        return any(self._is_of(row, job, self._options) for row in self.rows_of(self.relative_manifest(job)))

    def refuse(self, job: Job) -> None:
        """Leave a job alone after all."""
        self._set_state(job, _REFUSED)

    def settle_current(self, job: Job) -> None:
        """A job that its content shows to be up to date."""
        self._set_state(job, _CURRENT)

    def _set_state(self, job: Job, state: int) -> None:
        with self._lock:
            self._db.execute(
                "UPDATE jobs SET state = ? WHERE place = ? AND path = ?",
                (state, self._rule.place_of(job), job.path),
            )

    # -- the index afterwards --------------------------------------------------------------------

    def segments(self) -> list[str]:
        """Paths below DEST of the segments that were read."""
        with self._lock:
            return [path for (path,) in self._db.execute("SELECT path FROM segments ORDER BY path")]

    def iter_finished(self) -> Iterator[FinishedRow]:
        """Every row that DEST's listing bears out."""
        with self._lock:
            cursor = self._db.execute("SELECT row FROM finished")
        while True:
            with self._lock:
                page = cursor.fetchmany(PAGE)
            if not page:
                return
            for (text,) in page:
                yield _load(text)


def _is_folder(job: Job) -> bool:
    """Whether a checkpoint of several files is named by its folder, and not by an index in it."""
    several = job.identity is not None and job.identity.kind == JOINT_KIND
    return several and not job.path.endswith(INDEX_SUFFIX)


def _broken_link(link: str) -> Problem:
    detail = f"{link} is a symbolic link that leads nowhere; what lay below it cannot be mirrored"
    return Problem(link, StorageError.reason, detail)


def _dump(row: FinishedRow) -> str:
    return json.dumps(row.to_json(), separators=(",", ":"))


def _load(text: str) -> FinishedRow:
    return FinishedRow.from_json(json.loads(text))
