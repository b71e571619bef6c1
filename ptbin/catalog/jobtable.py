"""The temporary database of a run's work: its tables, and its jobs with the state each is in.

Knows nothing of stores, nor of how a job comes to its state (`worklist`, `collisions`). The database lies in
the system's temporary folder and vanishes with the table. One instance may be used by several threads.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from ptbin.catalog.jobs import Job
from ptbin.catalog.planning import OutputRule
from ptbin.manifests.vouching import Standing
from ptbin.stores import Identity

TO_DO, CURRENT, TO_ASK, REFUSED, LEFT_ALONE = range(5)
PAGE = 1000
"""Rows held at once while the list is read."""

_TABLES = """
CREATE TABLE stored (path TEXT PRIMARY KEY, size INTEGER, identity TEXT) WITHOUT ROWID;
CREATE TABLE finished (manifest TEXT, digest TEXT, row TEXT, PRIMARY KEY (manifest, digest)) WITHOUT ROWID;
CREATE TABLE sidecars (folder TEXT, job INTEGER);
CREATE TABLE segments (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE jobs (id INTEGER PRIMARY KEY, place TEXT, output TEXT, path TEXT, uri TEXT, size INTEGER,
    kind TEXT, value TEXT, certain INTEGER, copies INTEGER, state INTEGER, alone INTEGER DEFAULT 0);
"""


class JobTable:
    """Made empty. `db` and `lock` are for those who fill it; a transaction belongs under the lock."""

    def __init__(self, rule: OutputRule) -> None:
        import sqlite3  # here, because one file alone needs no table

        self.rule = rule
        """How outputs are named in this run."""
        self.lock = threading.RLock()
        self._file = tempfile.NamedTemporaryFile(prefix="ptbin-work-", suffix=".sqlite")  # noqa: SIM115
        self.db = sqlite3.connect(self._file.name, check_same_thread=False, isolation_level=None)
        try:
            # Nothing of it is worth keeping after a crash.
            self.db.executescript(
                "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16384;" + _TABLES
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with self.lock:
            self.db.close()
            self._file.close()

    def select(self, where: str, values: tuple[Any, ...], order: str = "id") -> Iterator[tuple[int, Job]]:
        """Jobs with their numbers, a page at a time: the list may change between two pages."""
        query = (
            "SELECT id, output, path, uri, size, kind, value, certain, copies, alone, "  # noqa: S608 - our own
            "(SELECT stored.size || ' ' || stored.identity FROM stored WHERE stored.path = output), "
            "copies AND EXISTS (SELECT 1 FROM finished WHERE manifest = output) FROM jobs "
            f"WHERE {where} ORDER BY {order}"
        )
        for row in self.rows(query, values):
            number, output, path, uri, size, kind, value, certain, copies, alone, there, known = row
            identity = Identity(kind, value) if kind is not None else None
            place, standing = f"{self.rule.base}/{output}", _standing(there, alone, known)
            yield number, Job(uri, size, place, path, bool(certain), identity, bool(copies), standing)

    def rows(self, query: str, values: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """What a query finds, read a page at a time, each under the lock."""
        with self.lock:
            cursor = self.db.execute(query, values)
        while True:
            with self.lock:
                page = cursor.fetchmany(PAGE)
            if not page:
                return
            yield from page

    def count(self) -> int:
        """Checkpoints that the listing came to, collisions aside."""
        return self._number("SELECT count(*) FROM jobs WHERE state != ?", REFUSED)

    def count_current(self) -> int:
        return self._number("SELECT count(*) FROM jobs WHERE state = ?", CURRENT)

    def to_do(self, *, copies: bool | None = None) -> tuple[int, int]:
        """How many are to be done, and their bytes; only conversions or copies where that is asked."""
        only = "" if copies is None else f" AND copies = {copies:d}"
        return (
            self._number(f"SELECT count(*) FROM jobs WHERE state = ?{only}", TO_DO),  # noqa: S608 - our own
            self._number(f"SELECT coalesce(sum(size), 0) FROM jobs WHERE state = ?{only}", TO_DO),  # noqa: S608
        )

    def count_to_ask(self) -> int:
        return self._number("SELECT count(*) FROM jobs WHERE state = ?", TO_ASK)

    def _number(self, query: str, state: int) -> int:
        with self.lock:
            return int(self.db.execute(query, (state,)).fetchone()[0])

    def iter_to_do(self, *, copies: bool | None = None) -> Iterator[Job]:
        """What is to be done, largest first; only conversions or copies where that is asked."""
        only = "" if copies is None else f" AND copies = {copies:d}"
        return (job for _, job in self.select(f"state = ?{only}", (TO_DO,), "size DESC, id"))

    def iter_current(self) -> Iterator[Job]:
        return (job for _, job in self.select("state = ?", (CURRENT,)))

    def iter_left_alone(self) -> Iterator[Job]:
        """Optimizers and the like, by their names, that would share a place with another output."""
        return (job for _, job in self.select("state = ?", (LEFT_ALONE,)))

    def iter_to_ask(self) -> Iterator[Job]:
        """Those with a manifest that the index does not know; `answer` settles them."""
        return (job for _, job in self.select("state = ?", (TO_ASK,)))

    def states_of(self, uri: str) -> set[int]:
        """The states of the jobs of a source; empty where there is none."""
        with self.lock:
            self.db.execute("CREATE INDEX IF NOT EXISTS uris ON jobs (uri)")
            found = self.db.execute("SELECT DISTINCT state FROM jobs WHERE uri = ?", (uri,)).fetchall()
        return {state for (state,) in found}

    def refuse(self, job: Job) -> None:
        """Leave a job alone after all."""
        self._set_state(job, REFUSED)

    def settle_current(self, job: Job) -> None:
        """A job that its content shows to be up to date."""
        self._set_state(job, CURRENT)

    def _set_state(self, job: Job, state: int) -> None:
        with self.lock:
            self.db.execute(
                "UPDATE jobs SET state = ? WHERE place = ? AND path = ?",
                (state, self.rule.place_of(job), job.path),
            )


def _standing(there: str | None, alone: int, known: int) -> Standing:
    if there is None:
        return Standing(None, alone=bool(alone))
    size, _, identity = there.partition(" ")
    return Standing(int(size), identity, is_known_copy=bool(known))
