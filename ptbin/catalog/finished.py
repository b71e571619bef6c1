"""What is done already: one output against its manifest, or a whole store against an index of finished work.

The manifests are the truth. The index below `DEST/_ptbin/index/` only spares reading them: a row says which
state of a manifest (its ETag, or what the store has instead) was made of which source with which options,
and what outputs it lists. It is believed where DEST's listing shows that very manifest and outputs of those
sizes; so a lost, stale or damaged index costs requests, never a wrong answer.

The index is a set of segments, gzip'd JSON lines under names that are never used twice: runs on one
destination at the same time each add their own. A run that finds many writes one that replaces those it has
read.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ptbin.catalog.finding import OWN_FOLDER
from ptbin.catalog.jobs import Job
from ptbin.conversion import Published
from ptbin.errors import NotFoundInStoreError, StorageError, VerificationError
from ptbin.manifests.damage import is_damaged
from ptbin.manifests.manifest import MANIFEST_SUFFIX, parse_manifest
from ptbin.options import ConvertOptions
from ptbin.sources.sidecars import change_of
from ptbin.stores import NO_OPTIONS, Place, RangeReader, Sides, identity_text, place_of
from ptbin.stores.copying import Copied, same_content

INDEX_FOLDER = f"{OWN_FOLDER}/index"
SEGMENT_SUFFIX = ".jsonl.gz"
LEVELS = ("none", "checksum", "load")

MAX_LINE_NBYTES = 1 << 20
"""A row with thousands of shards; longer lines are damage."""

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """One output that was finished.

    Attributes:
        manifest: its path below DEST; of a file that was copied, that file's.
        identity: of the manifest, as `kind:value`.
        digest: of source and options (`job_digest`).
        level: of its proof.
        outputs: (path relative to the manifest's folder, size in bytes) of each.
        source: URI of what it was made of. A row of a copy has it, for a copy has no manifest to tell;
            rows that earlier versions wrote of conversions do not.
    """

    manifest: str
    identity: str
    digest: str
    level: str
    outputs: tuple[tuple[str, int], ...]
    source: str = ""

    @property
    def is_copy(self) -> bool:
        """Of a file that was copied as it was."""
        return not self.manifest.endswith(MANIFEST_SUFFIX)

    def to_json(self) -> list[Any]:
        own = [self.source] if self.source else []
        return [self.manifest, self.identity, self.digest, self.level, *map(list, self.outputs), *own]

    @classmethod
    def from_json(cls, data: Any) -> FinishedRow:
        """Raises ValueError where `data` is not what `to_json` writes."""
        if not isinstance(data, list) or len(data) < 5:
            raise ValueError("no row")
        source = data.pop() if isinstance(data[-1], str) and len(data) > 5 else ""
        texts, outputs = data[:4], data[4:]
        if not all(isinstance(text, str) for text in texts) or texts[3] not in LEVELS:
            raise ValueError("no row")
        for pair in outputs:
            if not (isinstance(pair, list) and len(pair) == 2):
                raise ValueError("no row")
            if not (isinstance(pair[0], str) and type(pair[1]) is int):
                raise ValueError("no row")
        manifest, identity, digest, level = texts
        row = cls(manifest, identity, digest, level, tuple((path, size) for path, size in outputs), source)
        if row.is_copy and not source:
            # An early version wrote it. Without it the copy is compared once more, and remembered with one.
            raise ValueError("a copy without its source")
        return row

    def is_enough(self, options: ConvertOptions) -> bool:
        """Whether its proof is at least the one asked for."""
        return LEVELS.index(self.level) >= LEVELS.index(options.verify)


def job_digest(uri: str, size: int, identity: Mapping[str, str] | None, fingerprint: str) -> str:
    """One text for a state of a source and the options it is converted with."""
    facts = json.dumps([uri, size, identity, fingerprint], sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


def digest_of(job: Job, options: ConvertOptions) -> str:
    """What the index remembers of a job: source, its state, place and options, as one digest."""
    return _digest(job, _copy_fingerprint(job, options) if job.copies else options.fingerprint())


def _copy_fingerprint(job: Job, options: ConvertOptions) -> str:
    """A copy depends on options only where they change it."""
    return "copy" if change_of(job.output_name, options.dtype) is None else f"copy {options.dtype}"


def _digest(job: Job, fingerprint: str) -> str:
    identity = job.identity.to_json() if job.identity is not None else None
    return job_digest(job.source_uri, job.source_size, identity, fingerprint)


def row_of_copy(job: Job, path: str, copied: Copied, options: ConvertOptions) -> FinishedRow | None:
    """The row of a file that was copied to `path` below DEST."""
    if job.identity is None or not identity_text(copied.identity):
        return None
    digest = digest_of(job, options)
    own = ((job.output_name, copied.size),)
    return FinishedRow(path, identity_text(copied.identity), digest, "load", own, job.source_uri)


def row_of(manifest: Mapping[str, Any], path: str, identity: str) -> FinishedRow | None:
    """The row of a manifest at `path` below DEST in that state; None where nothing can be said of it."""
    source, level = manifest["source"], manifest["verification"].get("level", "none")
    if (
        not identity
        or is_damaged(manifest)
        or level not in LEVELS
        or not manifest["outputs"]
        or not isinstance(source.get("size"), int)
    ):
        return None
    digest = job_digest(
        source.get("uri", ""), source["size"], source.get("identity"), manifest["options_fingerprint"]
    )
    outputs = tuple((output["path"], output["size"]) for output in manifest["outputs"])
    return FinishedRow(path, identity, digest, level, outputs, str(source.get("uri", "")))


def read_finished(
    job: Job,
    path: str,
    options: ConvertOptions | None = None,
    sides: Sides = NO_OPTIONS,
) -> FinishedRow | None:
    """The row of the job's manifest as it is stored now (`path` below DEST); None where there is none.

    Costs one read. A copy has no manifest: it is compared with its source, byte for byte.

    Raises:
        StorageError: the store failed in another way than by having no such file.
    """
    if job.copies:
        options = options or ConvertOptions()
        same = same_content(
            sides.source_at(job.source_uri),
            sides.dest_at(job.dest_uri),
            change=change_of(job.output_name, options.dtype),
        )
        return row_of_copy(job, path, same, options) if same is not None else None
    place = sides.dest_at(job.dest_uri).beside(MANIFEST_SUFFIX)
    try:
        data, identity = place.read_identified()
        return row_of(parse_manifest(data, place.uri), path, identity_text(identity))
    except (NotFoundInStoreError, VerificationError):
        return None


def is_up_to_date(
    job: Job, options: ConvertOptions, *, dest_options: Mapping[str, Any] | None = None
) -> bool:
    """Whether the job's output is finished: see `find_finished`."""
    return find_finished(job, options, place_of(job.dest_uri, dest_options)) is not None


def find_finished(job: Job, options: ConvertOptions, place: Place) -> Published | None:
    """The output at `place`, if it was made of the job's very source with these options and is proven enough.

    Costs one small read, and one stat for each output.

    Raises:
        StorageError: the store failed in another way than by having no such file.
    """
    if options.force or job.identity is None:
        return None
    try:
        data, identity = place.beside(MANIFEST_SUFFIX).read_identified()
        manifest = parse_manifest(data, place.uri)
        row = row_of(manifest, "", "not asked for")
        if row is None or row.digest != digest_of(job, options) or not row.is_enough(options):
            return None
        if all((place.parent / name).stat().size == size for name, size in row.outputs):
            return Published(manifest, identity)
    except (NotFoundInStoreError, VerificationError):
        pass
    return None


# -- segments ------------------------------------------------------------------------------------


def iter_segment(place: Place) -> Iterator[FinishedRow]:
    """The rows of a segment, as far as they can be read; damage ends it, or costs a line. Memory: a block."""
    try:
        with place.open_reader() as reader:
            yield from iter_rows(_inflated(reader), FinishedRow.from_json)
    except (zlib.error, StorageError):
        return  # the manifests say the same, at a request each


def _inflated(reader: RangeReader) -> Iterator[bytes]:
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    for block in reader.iter_range(0, reader.size):
        pending = bytes(block)
        while pending:
            yield inflater.decompress(pending, 1 << 20)
            pending = inflater.unconsumed_tail


def iter_rows(blocks: Iterable[bytes], parse: Callable[[Any], Row]) -> Iterator[Row]:
    """Rows of JSON lines that come in blocks. A line that is not a row is passed over, a huge one ends it."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + bytes(block)).split(b"\n")
        for line in lines:
            try:
                row = parse(json.loads(line))
            except (ValueError, RecursionError):
                continue
            yield row
        if len(rest) > MAX_LINE_NBYTES:
            return


def write_segment(dest: Place, name: str, rows: Iterable[FinishedRow]) -> None:
    """Add a segment of that name, which no other run uses; nothing where there are no rows."""
    deflater = zlib.compressobj(6, wbits=16 + zlib.MAX_WBITS)
    found = False
    with (dest / INDEX_FOLDER / f"{name}{SEGMENT_SUFFIX}").open_writer(copies=False) as writer:
        for row in rows:
            line = json.dumps(row.to_json(), separators=(",", ":")) + "\n"
            writer.write(deflater.compress(line.encode()))
            found = True
        if found:
            writer.write(deflater.flush())
            writer.commit()
