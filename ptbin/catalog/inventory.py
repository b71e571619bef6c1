"""What DEST holds, as one listing of it shows, with the rows of the index of finished work that it bears out.

Kept in the temporary database of the run (`jobtable`). Costs: one listing, and a read of each segment of the
index.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

from ptbin.catalog.finding import is_in_own_folder
from ptbin.catalog.finished import INDEX_FOLDER, SEGMENT_SUFFIX, FinishedRow, iter_segment
from ptbin.catalog.jobtable import PAGE, JobTable
from ptbin.catalog.planning import OutputRule
from ptbin.errors import LimitExceededError, NotFoundInStoreError, VerificationError
from ptbin.manifests.manifest import parse_manifest
from ptbin.stores import WatchQuietly, Where, identity_text, place_of
from ptbin.values.names import is_unicode


class Inventory(JobTable):
    """Made empty; `read_dest` fills it."""

    def __init__(self, dest: Where) -> None:
        self.dest = place_of(dest)
        super().__init__(OutputRule(self.dest.uri))
        self.own_files: set[str] | None = None
        """Paths below DEST of the files in `_ptbin` itself; None where DEST was not listed."""

    def read_dest(self, tick: Callable[[], object]) -> None:
        self.own_files = set()
        self.db.execute("BEGIN")
        for number, item in enumerate(self.dest.iter_objects(WatchQuietly())):
            if number % PAGE == 0:
                tick()
            if not item.path.isascii() and not is_unicode(item.path):
                continue  # under no name that ptbin writes
            if not is_in_own_folder(item.path):
                row = (item.path, item.size, identity_text(item.identity))
                self.db.execute("INSERT OR REPLACE INTO stored VALUES (?, ?, ?)", row)
            elif item.path.startswith(f"{INDEX_FOLDER}/") and item.path.endswith(SEGMENT_SUFFIX):
                self.db.execute("INSERT OR REPLACE INTO segments VALUES (?)", (item.path,))
            elif item.path.count("/") == 1:
                self.own_files.add(item.path)
        self.db.execute("COMMIT")
        for (segment,) in self.db.execute("SELECT path FROM segments ORDER BY path").fetchall():
            tick()
            self.learn(iter_segment(self.dest / segment))

    def learn(self, rows: Iterable[FinishedRow]) -> None:
        """Take rows of the index in, those that speak of what DEST's listing shows."""
        with self.lock:
            self.db.execute("BEGIN")
            for row in rows:
                known = self.db.execute("SELECT identity FROM stored WHERE path = ?", (row.manifest,))
                if (found := known.fetchone()) is not None and found[0] and found[0] == row.identity:
                    values = (row.manifest, row.digest, _dump(row))
                    self.db.execute("INSERT OR REPLACE INTO finished VALUES (?, ?, ?)", values)
            self.db.execute("COMMIT")

    def rows_of(self, manifest: str) -> list[FinishedRow]:
        """What is known of the stored state of a manifest or a copy. All of it is true: a copy that was only
        touched at its source, say, is one state in DEST made of two states of SOURCE.
        """
        with self.lock:
            found = self.db.execute("SELECT row FROM finished WHERE manifest = ?", (manifest,)).fetchall()
        return [_load(text) for (text,) in found]

    def size_of(self, path: str) -> int | None:
        with self.lock:
            found = self.db.execute("SELECT size FROM stored WHERE path = ?", (path,)).fetchone()
        return None if found is None else int(found[0])

    def outputs_before(self, manifest: str) -> list[str]:
        """Names of the files that a stored manifest lists."""
        if rows := self.rows_of(manifest):
            return [name for row in rows for name, _ in row.outputs]
        if self.size_of(manifest) is None:
            return []
        try:
            found = parse_manifest((self.dest / manifest).read_bytes(), manifest)
        except (NotFoundInStoreError, VerificationError, LimitExceededError):
            return []
        return [output["path"] for output in found["outputs"]]

    def segments(self) -> list[str]:
        """Paths below DEST of the segments that were read."""
        with self.lock:
            return [path for (path,) in self.db.execute("SELECT path FROM segments ORDER BY path")]

    def iter_finished(self) -> Iterator[FinishedRow]:
        """Every row that DEST's listing bears out."""
        return (_load(text) for (text,) in self.rows("SELECT row FROM finished"))


def _dump(row: FinishedRow) -> str:
    return json.dumps(row.to_json(), separators=(",", ":"))


def _load(text: str) -> FinishedRow:
    return FinishedRow.from_json(json.loads(text))
