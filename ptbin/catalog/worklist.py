"""A whole run's work, planned in a temporary database: millions of checkpoints cost disk, not memory.

`plan` lists DEST once and SOURCE once, decides for each checkpoint where its output goes, whether two
collide, and whether it is done already, by the index of finished work. What the index does not know is left
to be asked, one manifest each. The work is handed out largest first.

The database is `jobtable`'s, what shares a place is for `collisions` to say. Costs: two listings and the
segments of the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from ptbin.catalog.cases import folds_case
from ptbin.catalog.collisions import settle_collisions, suffixes_beside
from ptbin.catalog.entries import Entries
from ptbin.catalog.finding import find_checkpoints, is_in_own_folder
from ptbin.catalog.finished import (
    FinishedRow,
    digest_of,
)
from ptbin.catalog.globs import split_glob
from ptbin.catalog.inventory import Inventory
from ptbin.catalog.jobs import Found, Job, Problem
from ptbin.catalog.jobtable import CURRENT, PAGE, TO_ASK, TO_DO
from ptbin.catalog.named import NamedFiles
from ptbin.catalog.request import RunRequest
from ptbin.manifests.claims import ASIDE_SUFFIX, CLAIM_TARGET_SUFFIX
from ptbin.manifests.manifest import MANIFEST_SUFFIX
from ptbin.options import ConvertOptions
from ptbin.sources.companions import is_companion, is_sidecar
from ptbin.sources.output_names import SHARD_NUMBER, split_bases
from ptbin.sources.part_names import INDEX_SUFFIX
from ptbin.sources.suffixes import OTHER_SUFFIXES, suffix_of
from ptbin.stores import NO_OPTIONS, ListedObject, Place, Where

NEW_EVERY = 20
"""One of this many jobs is looked up while SOURCE is still listed."""
JOINT_KIND = "parts"
"""Of identities of several files together (`stores.joined.joint_identity`)."""


class WorkList(Inventory):
    """Made empty; `plan` fills it, once."""

    def __init__(self, dest: Where) -> None:
        super().__init__(dest)
        self._options = ConvertOptions()
        self._source_at: Callable[[Where], Place] = NO_OPTIONS.source_at
        self._on_new: Callable[[Job], bool] | None = None
        self.entries = Entries()
        """What the listing of SOURCE passed over."""

    # -- planning --------------------------------------------------------------------------------

    def plan(
        self,
        request: RunRequest,
        *,
        source_at: Callable[[Where], Place] = NO_OPTIONS.source_at,
        tick: Callable[[], object] = lambda: None,
        on_new: Callable[[Job], bool] | None = None,
    ) -> list[Problem]:
        """Fill the list; what cannot be done at all. `tick` is called now and then, and may raise.

        With `force` nothing is up to date; with `distrust` everything is to be done that is not compared by
        its content. `entries` says what was passed over. `on_new` is called with jobs of which DEST holds
        nothing, some of them, until it returns true.

        Raises:
            NotFoundInStoreError, StorageError: from the stores.
        """
        options = request.planning
        named = NamedFiles(request.named) if request.named is not None else None
        with self.lock:
            self._clear()
            self.rule = replace(request.rule, folds_case=folds_case(self.dest.store, self.dest.path))
            self._options, self._source_at = options, source_at
            self.read_dest(tick)
            others: list[ListedObject] = []
            top, pattern = split_glob(request.source, source_at)
            globs = (*request.include, *request.copied, pattern or "")
            self.entries = Entries(
                shown=globs,
                exclude=request.exclude,
                copy_links=request.copy_links,
                is_named=named.holds if named is not None else lambda _: False,
            )
            found = find_checkpoints(
                top,
                pattern=pattern,
                include=request.include,
                exclude=request.exclude,
                is_other=lambda item: request.copies(item.path),
                other=others.append,
                entries=self.entries,
                parts=options.parts,
                named=named,
            )
            self._on_new = on_new
            problems = self._add(found, others, tick)
            problems += self.entries.problems
            problems += settle_collisions(self, options)
            if named is not None and request.must_exist:
                problems += named.missing(request.source)
            self._find_free_places()
            if not options.force and not request.distrust:
                self._look_up(options, tick)
            return problems

    def _find_free_places(self) -> None:
        """Mark the jobs of which DEST's listing shows that no file of theirs lies there, by its name."""
        # In Unicode a point follows a dash, a slash a point, a nought a slash: each range is all the names
        # that begin with a text and the first of the two.
        ranges = [("output", "output || '/'")]
        if self._options.max_shard_size is not None:
            ranges.append(("stem(output) || '-'", "stem(output) || '.'"))
        if self._options.layout == "hf":  # companions go into the same folder
            ranges.append(("folder(output) || '/'", "folder(output) || '0'"))
        free = [
            f"NOT EXISTS (SELECT 1 FROM stored WHERE path >= {first} AND path < {last})"  # noqa: S608
            for first, last in ranges
        ]
        if self._options.layout == "hf":
            free.append("output LIKE '%/%'")
        self.db.create_function("stem", 1, lambda path: path.rpartition(".")[0], deterministic=True)
        self.db.create_function("folder", 1, lambda path: path.rpartition("/")[0], deterministic=True)
        self.db.execute(f"UPDATE jobs SET alone = 1 WHERE {' AND '.join(free)}")  # noqa: S608 - our own

    def _clear(self) -> None:
        for table in ("stored", "finished", "segments", "jobs", "sidecars"):
            self.db.execute(f"DELETE FROM {table}")  # noqa: S608 - names from the line above

    def _add(
        self, found: Iterable[Found], others: list[ListedObject], tick: Callable[[], object]
    ) -> list[Problem]:
        """`others` fills while `found` is read, and is emptied here."""
        problems: dict[str, Problem] = {}
        self.db.execute("BEGIN")
        for number, job in enumerate(self._jobs(found, others)):
            if number % PAGE == 0:
                tick()
            if isinstance(job, Problem):
                problems.setdefault(job.source, job)  # of a folder's name, one for all in it
                continue
            self._insert(job)
        self.db.execute("COMMIT")
        self.db.execute("CREATE INDEX IF NOT EXISTS places ON jobs (place)")
        self._put_sidecars_beside_weights()
        return list(problems.values())

    def _insert(self, job: Job) -> None:
        kind, value = (job.identity.kind, job.identity.value) if job.identity else (None, None)
        cursor = self.db.execute(
            "INSERT INTO jobs (place, output, path, uri, size, kind, value, certain, copies, state) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self.rule.place_of(job),
                self.rule.relative(job),
                job.path,
                job.source_uri,
                job.source_size,
                kind,
                value,
                job.certain,
                job.copies,
                TO_DO,
            ),
        )
        if self._on_new is not None and (cursor.lastrowid or 0) % NEW_EVERY == 1:
            self._look_whether_new(job)
        folder, _, name = job.path.rpartition("/")
        if job.copies and self.rule.layout == "hf" and is_sidecar(name):
            self.db.execute("INSERT INTO sidecars VALUES (?, ?)", (folder, cursor.lastrowid))

    def _look_whether_new(self, job: Job) -> None:
        if (
            self.size_of(self.relative_manifest(job)) is None
            and self._on_new is not None
            and self._on_new(job)
        ):
            self._on_new = None

    def _put_sidecars_beside_weights(self) -> None:
        """Where layout `hf` gives weights a folder of their own, configuration and tokenizer go there too.

        As copies of their own: no conversion takes them along, so an edited `config.json` costs one copy.
        """
        if self.db.execute("SELECT 1 FROM sidecars").fetchone() is None:
            return
        self.db.execute("CREATE INDEX IF NOT EXISTS folders ON sidecars (folder)")
        self.db.execute("BEGIN")
        for _, weights in self.select("NOT copies", ()):
            if _is_folder(weights):
                continue  # its companions lie in it, and go to the same place anyhow
            output = self.rule.relative(weights)
            beside = "id IN (SELECT job FROM sidecars WHERE folder = ?)"
            for _, job in list(self.select(beside, (weights.path.rpartition("/")[0],))):
                path = self.rule.beside_weights(job.path, output)
                place = self.rule.fold(path) if path is not None else ""
                if path is None or self.db.execute("SELECT 1 FROM jobs WHERE place = ?", (place,)).fetchone():
                    continue
                self._insert(replace(job, dest_uri=f"{self.rule.base}/{path}"))
        self.db.execute("COMMIT")

    def _jobs(self, found: Iterable[Found], others: list[ListedObject]) -> Iterator[Job | Problem]:
        for item in found:
            yield self.rule.apply(item)
            yield from self._copies(others)
        yield from self._copies(others)

    def _copies(self, others: list[ListedObject]) -> Iterator[Job | Problem]:
        while others:
            item = others.pop(0)
            made = self.rule.apply(Found(item.path, item.uri, item.size, item.identity, True))
            if _is_doubtful(item.path) and (isinstance(made, Problem) or self._converts(made)):
                yield made
            else:
                yield self.rule.copy(item)

    def _converts(self, job: Job) -> bool:
        """Whether a file that is to go along as it is, by its name a checkpoint, is one; as it was known."""
        copy = replace(job, dest_uri=f"{self.rule.base}/{job.path}", copies=True)
        for kind in (job, copy):
            digest = digest_of(kind, self._options)
            if any(row.digest == digest for row in self.rows_of(self.relative_manifest(kind))):
                return not kind.copies
        from ptbin.catalog.comparing import is_convertible  # reads checkpoints: nothing else here does

        return is_convertible(self._source_at(job.source_uri), self._options)

    def _look_up(self, options: ConvertOptions, tick: Callable[[], object]) -> None:
        """Decide by the index; where a manifest is there that it does not know, that is to be asked."""
        self.db.execute("BEGIN")
        for number, (job_id, job) in enumerate(self.select("state = ?", (TO_DO,))):
            if number % PAGE == 0:
                tick()
            manifest = self.relative_manifest(job)
            if known := self.rows_of(manifest):
                state = CURRENT if any(self._is_current(row, job, options) for row in known) else TO_DO
            elif job.identity is not None and self.size_of(manifest) is not None:
                state = TO_ASK
            else:
                continue
            self.db.execute("UPDATE jobs SET state = ? WHERE id = ?", (state, job_id))
        self.db.execute("COMMIT")

    def _is_current(self, row: FinishedRow, job: Job, options: ConvertOptions) -> bool:
        return row.is_enough(options) and self._is_of(row, job, options)

    def _is_of(self, row: FinishedRow, job: Job, options: ConvertOptions) -> bool:
        if job.identity is None or row.digest != digest_of(job, options):
            return False
        folder = row.manifest[: -len(row.manifest.rsplit("/", 1)[-1])]
        return all(self.size_of(folder + name) == size for name, size in row.outputs)

    # -- what was planned ------------------------------------------------------------------------

    def relative_manifest(self, job: Job) -> str:
        """Path below DEST of the job's manifest; of a copy, its own, for that has none."""
        return self.rule.relative(job) + ("" if job.copies else MANIFEST_SUFFIX)

    def was_made(self, job: Job) -> bool:
        """Whether DEST's listing shows what a run made of the job: its manifest, or the copy itself."""
        with self.lock:
            return self.size_of(self.relative_manifest(job)) is not None

    def answer(
        self, jobs: Sequence[Job], rows: Iterable[FinishedRow], options: ConvertOptions
    ) -> list[FinishedRow]:
        """What the manifests of those jobs say; returns the rows that belong into the index."""
        with self.lock:
            rows = list(rows)
            self.learn(rows)
            kept = []
            for job in jobs:
                known = self.rows_of(self.relative_manifest(job))
                current = any(self._is_current(row, job, options) for row in known)
                kept.extend(known)
                self.db.execute(
                    "UPDATE jobs SET state = ? WHERE place = ? AND state = ?",
                    (CURRENT if current else TO_DO, self.rule.place_of(job), TO_ASK),
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
        with self.lock:
            return [
                name
                for name in dict.fromkeys(self.outputs_before(manifest))
                if self.db.execute(query, (self.rule.fold(folder + name),)).fetchone()
            ]

    def is_planned(self, path: str) -> bool:
        """Whether this run would write a file at `path` below DEST: an output, a shard, a manifest."""
        if is_in_own_folder(path) or not path.rpartition("/")[2]:  # the latter: a probe of `check_writable`
            return True
        names = {path.removesuffix(MANIFEST_SUFFIX).removesuffix(INDEX_SUFFIX)}
        names |= {SHARD_NUMBER.sub("", name) for name in names}
        if self._options.split:
            names |= {base for name in names for base in split_bases(name)}
        with self.lock:
            return any(
                self.db.execute("SELECT 1 FROM jobs WHERE place = ?", (self.rule.fold(name),)).fetchone()
                for name in names
            )

    def discard_unfinished(self) -> int:
        """Remove what killed writers of these outputs left in DEST, which this run has to itself; how many.

        Raises:
            StorageError: the store failed.
        """
        return self.dest.store.discard_unfinished(self.dest.path, self._is_unfinished)

    def _is_unfinished(self, path: str) -> bool:
        """Whether what was to go to `path` is a planned output, or a claim that a manifest has overtaken."""
        if path.endswith(ASIDE_SUFFIX):
            return self.is_planned(path.removesuffix(ASIDE_SUFFIX))  # a claim that was being written
        if path.endswith(CLAIM_TARGET_SUFFIX):
            return self.size_of(path.removesuffix(CLAIM_TARGET_SUFFIX) + MANIFEST_SUFFIX) is not None
        return self.is_planned(path)

    # -- what was there before -------------------------------------------------------------------

    def present(self, job: Job) -> list[str]:
        """Paths below DEST of what this job would write over, as the listing shows them.

        Where the index does not know the output, its manifest is read.

        Raises:
            StorageError: it could not be read.
        """
        key, output = self.relative_manifest(job), self.rule.relative(job)
        named = [output, key]
        if not job.copies:
            folder = key[: -len(key.rsplit("/", 1)[-1])]
            named += [output + suffix for suffix in suffixes_beside(self._options)]
            named += [folder + name for name in self.outputs_before(key)]
            named += self._shards_of(output)
        return [path for path in dict.fromkeys(named) if self.size_of(path) is not None]

    def _shards_of(self, output: str) -> list[str]:
        """What is stored under names that shards of this output may get."""
        if self._options.max_shard_size is None:
            return []
        stem = output.rpartition(".")[0]
        # A point follows a dash in Unicode: the range is everything that begins with the stem and a dash.
        query = "SELECT path FROM stored WHERE path > ? AND path < ?"
        with self.lock:
            found = self.db.execute(query, (f"{stem}-", f"{stem}.")).fetchall()
        return [path for (path,) in found if SHARD_NUMBER.sub("", path) == output]

    def iter_unexplained(self) -> Iterator[str]:
        """Paths below DEST of the manifests, and the copies that the index knows, of no job of this run."""
        query = "SELECT manifest FROM finished UNION SELECT path FROM stored WHERE path LIKE ?"
        found = self.rows(query, ("%" + MANIFEST_SUFFIX,))
        return (path for (path,) in found if not self._is_explained(path))

    def _is_explained(self, path: str) -> bool:
        """Whether a job of this run has that manifest, or is that copy. Names that differ in case do not."""
        place = path.removesuffix(MANIFEST_SUFFIX)
        with self.lock:
            found = self.db.execute(
                "SELECT output, copies FROM jobs WHERE place = ?", (self.rule.fold(place),)
            ).fetchall()
        return any(output + ("" if copies else MANIFEST_SUFFIX) == path for output, copies in found)

    def is_only_unproven(self, job: Job) -> bool:
        """Whether a job is to be done for a stronger proof alone: its output would come out the same."""
        return any(self._is_of(row, job, self._options) for row in self.rows_of(self.relative_manifest(job)))


def _is_doubtful(path: str) -> bool:
    """Whether a file that is to be copied may be a checkpoint: its content decides."""
    return not is_companion(path) and suffix_of(path.rpartition("/")[2]) not in OTHER_SUFFIXES


def _is_folder(job: Job) -> bool:
    """Whether a checkpoint of several files is named by its folder, and not by an index in it."""
    several = job.identity is not None and job.identity.kind == JOINT_KIND
    return several and not job.path.endswith(INDEX_SUFFIX)
