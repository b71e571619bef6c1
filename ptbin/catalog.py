"""Questions about whole stores: which checkpoints are there, what becomes of each, what is done already.

Planning (`plan_outputs`, `relative_output`) is pure; the rest asks a store. Listings are streamed. Which
files are candidates is decided by name only, so that listing costs no request per file; whether a
candidate is a checkpoint is decided by its content when it is converted (`Found.certain` says whether
the name alone promised one).
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ptbin.errors import (
    CheckpointError,
    NotFoundInStoreError,
    OutputCollisionError,
    StorageError,
    UsageError,
    VerificationError,
)
from ptbin.folders import INDEX_SUFFIX, Grouping, is_folder_part
from ptbin.manifest import MANIFEST_SUFFIX, parse_manifest
from ptbin.options import ConvertOptions, Layout, Naming, OutputFormat
from ptbin.sources import find_source
from ptbin.stores import Identity, ListedObject, Store, is_partial_name, open_store

__all__ = [
    "Found",
    "Job",
    "Problem",
    "check_call",
    "find_checkpoints",
    "find_manifests",
    "find_one",
    "find_orphans",
    "is_up_to_date",
    "plan_outputs",
    "problem_of",
]

RUNS_FOLDER = "_ptbin"
OUTPUT_SUFFIX = ".bin"
OUTPUT_SUFFIXES: dict[OutputFormat, str] = {"torch": ".bin", "raw": ".bin", "safetensors": ".safetensors"}

# Stems under which Hugging Face folders keep their weights: the folder is the model, not the file.
_HF_STEMS = ("model", "pytorch_model", "adapter_model")
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}(?=\.[a-z]+$)")

# Names under which people keep checkpoints, and archives of them: always looked into.
CHECKPOINT_SUFFIXES = frozenset(
    ".pt .pth .ckpt .bin .th .tar .pkl .pickle .model .ptc .pts "
    ".jit .torchscript .zip .7z .gz .xz .weights .pt2 .safetensors".split()
)
# Names that cannot be one: never looked into.
OTHER_SUFFIXES = frozenset(
    """.json .jsonl .txt .md .rst .yaml .yml .toml .ini .cfg .conf .log .csv .tsv .html .htm .xml .pdf
    .png .jpg .jpeg
    .gif .svg .bmp .webp .mp4 .wav .py .ipynb .sh .c .h .cpp .cu .js .css .lock .sha256 .md5 .sig .asc .crc
    .tfevents .db .sqlite .parquet .arrow .npy .npz .h5 .hdf5 .onnx .tflite .gguf .pb .out .err""".split()
)

_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Found:
    """A candidate below SOURCE: `path` relative to it, `size` in bytes."""

    path: str
    uri: str
    size: int
    identity: Identity | None
    certain: bool


@dataclass(frozen=True, slots=True)
class Job:
    """One checkpoint and where its output goes."""

    source_uri: str
    source_size: int
    dest_uri: str
    path: str
    certain: bool
    identity: Identity | None

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["identity"] = self.identity.to_json() if self.identity is not None else None
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        identity = data["identity"]
        return cls(**{**data, "identity": Identity.from_json(identity) if identity is not None else None})


@dataclass(frozen=True, slots=True)
class Problem:
    """A checkpoint that was not converted, with the stable reason code."""

    source: str
    reason: str
    detail: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> Problem:
        return cls(**data)


def problem_of(source: str, error: Exception) -> Problem:
    """An error of one checkpoint as a row of the summary; foreign errors become `internal_error`."""
    reason = getattr(error, "reason", None)
    if not isinstance(reason, str):
        return Problem(source, "internal_error", f"{type(error).__name__}: {error}")
    return Problem(source, reason, str(error))


def find_checkpoints(
    source: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Found]:
    """Candidates at or below SOURCE: one file, a directory or prefix, or a glob.

    Args:
        include: globs on the path below SOURCE; where given, they decide alone what is a candidate.
        exclude: globs that take candidates away.

    Raises:
        NotFoundInStoreError: SOURCE does not exist.
    """
    root, pattern = _split_glob(source, storage_options)
    store, path = open_store(root, storage_options)
    if pattern is None and not store.is_directory(path):
        yield find_one(source, storage_options=storage_options)
        return

    def wanted(item: ListedObject) -> Iterator[Found]:
        if pattern is None or _matches(f"/{item.path}", pattern):
            certain = _is_candidate(item, include, exclude)
            if certain is not None:
                yield Found(item.path, item.uri, item.size, item.identity, certain)

    grouping = Grouping()
    for item in store.iter_objects(path):
        if _is_our_own(item.path):
            continue
        if is_folder_part(item.path.rpartition("/")[2]):
            grouping.add(item)  # a later file may say that the two are one checkpoint
        else:
            yield from wanted(item)
    groups, single = grouping.finish()
    for item in single:
        yield from wanted(item)
    for group in groups:
        paths = [group.handle, *(member.path for member in group.members)]
        if pattern is not None and not any(_matches(f"/{path}", pattern) for path in paths):
            continue
        if any(_matches(path, glob) for glob in exclude for path in paths[:1]) or (
            include and not any(_matches(path, glob) for glob in include for path in paths)
        ):
            continue
        uri = store.uri_of(f"{path.rstrip('/')}/{group.handle}" if group.handle else path)
        name = group.handle or path.rstrip("/").rpartition("/")[2]
        yield Found(name, uri, group.size, group.identity, True)


def find_one(source: str, *, storage_options: Mapping[str, Any] | None = None) -> Found:
    """SOURCE as one checkpoint: a file, an index with its shards, or a folder that is one.

    Raises:
        NotFoundInStoreError: nothing is there. UsageError: a folder that is not one checkpoint.
    """
    place = find_source(source, storage_options)
    name = place.path.rstrip("/").rpartition("/")[2]
    if not place.parts:
        stat = place.store.stat(place.path)
        return Found(name, stat.uri, stat.size, stat.identity, True)
    return Found(name, place.store.uri_of(place.path), place.size, place.identity, True)


def _is_our_own(path: str) -> bool:
    """Run records, manifests and unfinished outputs are no checkpoints."""
    return RUNS_FOLDER in path.split("/") or is_partial_name(path) or path.endswith(MANIFEST_SUFFIX)


def _is_candidate(item: ListedObject, include: Sequence[str], exclude: Sequence[str]) -> bool | None:
    """True: by its name a checkpoint. False: its content must tell. None: passed over."""
    name = item.path.rpartition("/")[2]
    if not name or _is_our_own(item.path):
        return None
    if any(_matches(item.path, glob) for glob in exclude):
        return None
    if include:
        return True if any(_matches(item.path, glob) for glob in include) else None
    suffix = _suffix(name)
    if suffix in OTHER_SUFFIXES or name.startswith(".") or ".tfevents." in name:
        return None
    return suffix in CHECKPOINT_SUFFIXES


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _matches(path: str, pattern: str) -> bool:
    """Glob on a relative path: `**` crosses folders, a pattern without a slash matches names at any depth."""
    if "/" not in pattern:
        return fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern)
    return _compiled(pattern).fullmatch(path) is not None


def _compiled(pattern: str) -> re.Pattern[str]:
    pieces = []
    position = 0
    while position < len(pattern):
        if pattern.startswith("**/", position):
            pieces.append("(?:.*/)?")
            position += 3
        elif pattern.startswith("**", position):
            pieces.append(".*")
            position += 2
        elif pattern[position] == "*":
            pieces.append("[^/]*")
            position += 1
        elif pattern[position] == "?":
            pieces.append("[^/]")
            position += 1
        elif pattern[position] == "[" and (end := pattern.find("]", position + 2)) > 0:
            # fnmatch knows all about classes: "(?s:" + class + ")\\Z" is what it makes of one.
            pieces.append(fnmatch.translate(pattern[position : end + 1])[4:-3])
            position = end + 1
        else:
            pieces.append(re.escape(pattern[position]))
            position += 1
    return re.compile("".join(pieces), re.DOTALL)


def _split_glob(source: str, storage_options: Mapping[str, Any] | None) -> tuple[str, str | None]:
    """SOURCE up to the first wildcard's folder, and the pattern below it; (SOURCE, None) without wildcard.

    An existing path wins over its reading as a pattern.
    """
    if _GLOB.search(source) is None:
        return source, None
    store, path = open_store(source, storage_options)
    with contextlib.suppress(StorageError, ValueError):
        if store.is_directory(path):
            return source, None
        store.stat(path)
        return source, None
    fixed: list[str] = []
    parts = source.split("/")
    while parts and _GLOB.search(parts[0]) is None:
        fixed.append(parts.pop(0))
    root = "/".join(fixed) or ("/" if source.startswith("/") else ".")
    pattern = "/".join(parts)
    # A leading slash anchors the pattern at the listing's root, as a shell's glob is.
    return root, f"/{pattern}"


def plan_outputs(
    found: Iterable[Found],
    dest: str,
    *,
    naming: Naming = "replace",
    format: OutputFormat = "torch",  # noqa: A002 - as ConvertOptions calls it
    layout: Layout = "mirror",
    suffix: str | None = None,
) -> tuple[list[Job], list[Problem]]:
    """Where each checkpoint's output goes, and those that would share one (none of them is converted).

    Pure. `replace` puts `.bin` in the place of the suffix, `append` behind it. Layout `hf` gives each
    checkpoint a folder, unless it lies in one under a name of Hugging Face's already. `suffix` is that of
    the outputs where they are of another kind (`.pt`).
    """
    jobs: dict[str, list[Job]] = {}
    problems: list[Problem] = []
    base = dest.rstrip("/") or dest
    for item in found:
        parts = item.path.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\\" in item.path or "\0" in item.path:
            problems.append(
                Problem(
                    item.uri,
                    "unsafe_path",
                    f"{item.path!r} is no plain relative path; rename the object first",
                )
            )
            continue
        output = relative_output(item.path, naming, suffix or OUTPUT_SUFFIXES[format], layout)
        # Case-folded, because the destination may be a file system that does not tell the two apart.
        jobs.setdefault(output.casefold(), []).append(
            Job(item.uri, item.size, f"{base}/{output}", item.path, item.certain, item.identity)
        )
    planned: list[Job] = []
    for same in jobs.values():
        if len(same) == 1:
            planned.extend(same)
            continue
        # Files that only their content could make a checkpoint do not stand in the way of certain ones.
        certain = [job for job in same if job.certain]
        if len(certain) == 1:
            planned.extend(certain)
            continue
        for job in certain or same:
            others = ", ".join(other.path for other in same if other is not job)
            problems.append(
                Problem(
                    job.source_uri,
                    OutputCollisionError.reason,
                    f"{job.path} and {others} both map to {job.dest_uri}; --naming append keeps them apart",
                )
            )
    return planned, problems


def relative_output(
    path: str, naming: Naming, output_suffix: str = OUTPUT_SUFFIX, layout: Layout = "mirror"
) -> str:
    """Path of the output below DEST for a checkpoint at `path` below SOURCE."""
    path = path.removesuffix(INDEX_SUFFIX)
    folder, slash, name = path.rpartition("/")
    if layout == "hf":
        stem = name.rpartition(".")[0]
        adapter = stem == "adapter_model"
        own = "adapter_model" if adapter else "model" if output_suffix == ".safetensors" else "pytorch_model"
        if stem in _HF_STEMS:
            return f"{folder}{slash}{own}{output_suffix}"
        inside = path if naming == "append" else relative_output(path, naming, "")
        return f"{inside}/{own}{output_suffix}"
    if naming == "append":
        return f"{path}{output_suffix}"
    stem = name[: -len(".tar")] if name.lower().endswith((".pth.tar", ".pt.tar", ".ckpt.tar")) else name
    suffix = _suffix(stem)
    if suffix in CHECKPOINT_SUFFIXES:
        stem = stem[: -len(suffix)]
    return f"{folder}{slash}{stem}{output_suffix}"


def is_up_to_date(
    job: Job, options: ConvertOptions, *, dest_options: Mapping[str, Any] | None = None
) -> bool:
    """Whether the job's output exists, was made of this very source with these options, and is proven enough.

    Costs one small read, and one stat for each output.

    Raises:
        StorageError: the store failed in another way than by having no such file.
    """
    if options.force or job.identity is None:
        return False
    store, path = open_store(job.dest_uri, dest_options)
    try:
        manifest = parse_manifest(store.read_bytes(path + MANIFEST_SUFFIX), job.dest_uri)
    except (NotFoundInStoreError, VerificationError):
        return False
    levels = ("none", "checksum", "load")
    proven = manifest["verification"].get("level", "none")
    source = manifest["source"]
    if (
        source.get("identity") != job.identity.to_json()
        or source.get("uri") != job.source_uri
        or source.get("size") != job.source_size
        or not manifest["outputs"]
        or manifest["options_fingerprint"] != options.fingerprint()
        or proven not in levels
        or levels.index(proven) < levels.index(options.verify)
    ):
        return False
    folder = path[: -len(path.rsplit("/", 1)[-1])]
    try:
        return all(
            store.stat(folder + output["path"]).size == output["size"] for output in manifest["outputs"]
        )
    except NotFoundInStoreError:
        return False


def find_manifests(dest: str, *, storage_options: Mapping[str, Any] | None = None) -> Iterator[str]:
    """URIs of all manifests at or below DEST (DEST may be one manifest, or one output that has one)."""
    store, path = open_store(dest, storage_options)
    if not store.is_directory(path):
        single = path if path.endswith(MANIFEST_SUFFIX) else path + MANIFEST_SUFFIX
        store.stat(single)
        yield store.uri_of(single)
        return
    for item in store.iter_objects(path):
        if item.path.endswith(MANIFEST_SUFFIX) and RUNS_FOLDER not in item.path.split("/"):
            yield item.uri


def find_orphans(dest: str, *, storage_options: Mapping[str, Any] | None = None) -> Iterator[str]:
    """URIs of weights below DEST that no manifest vouches for; shards are vouched for by their output's."""
    store, path = open_store(dest, storage_options)
    if not store.is_directory(path):
        return
    outputs: dict[str, str] = {}
    manifests: set[str] = set()
    for item in store.iter_objects(path):
        if RUNS_FOLDER in item.path.split("/"):
            continue
        if item.path.endswith(MANIFEST_SUFFIX):
            manifests.add(item.path.removesuffix(MANIFEST_SUFFIX))
        elif item.path.endswith(tuple(OUTPUT_SUFFIXES.values())):
            outputs[item.path] = item.uri
    for name, uri in outputs.items():
        if not {name, _SHARD.sub("", name)} & manifests:
            yield uri


def check_call(
    source: str,
    dest: str | None,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    writes: bool = True,
) -> None:
    """Refuse a call that cannot work, before anything is written.

    Raises:
        UsageError: SOURCE missing or empty, DEST inside SOURCE or equal to it.
        StorageError: no access to either, no such bucket, DEST not writable.
    """
    root, pattern = _split_glob(source, source_options)
    store, path = open_store(root, source_options)
    if store.is_directory(path):
        if next(iter(store.iter_objects(path)), None) is None:
            raise UsageError(f"{store.uri_of(path)}: nothing is there to convert")
    elif pattern is not None:
        raise UsageError(f"{store.uri_of(path)}: no such directory or prefix")
    else:
        try:
            store.stat(path)
        except NotFoundInStoreError as error:
            raise UsageError(str(error)) from error
    if dest is None:
        return
    dest_store, dest_path = open_store(dest, dest_options)
    _refuse_overlap(store, path, dest_store, dest_path, is_directory=store.is_directory(path))
    if writes:
        dest_store.check_writable(dest_path)


def _refuse_overlap(source: Store, path: str, dest: Store, dest_path: str, *, is_directory: bool) -> None:
    above, below = (_real_place(*place) for place in ((source, path), (dest, dest_path)))
    if above == below:
        raise UsageError(f"{below}: source and destination are the same place")
    if is_directory and below.startswith(f"{above}/"):
        raise UsageError(
            f"{below} lies inside the source {above}: the next run "
            "would take outputs for checkpoints; choose another place"
        )


def _real_place(store: Store, path: str) -> str:
    """The URI, local ones with symbolic links resolved: a link may lead from one place into the other."""
    return (os.path.realpath(path) if store.protocol == "file" else store.uri_of(path)).rstrip("/")


def is_rejection(reason: str) -> bool:
    """Whether a problem's reason speaks of the checkpoint itself, not of a store or of the proof."""
    return reason in _CHECKPOINT_REASONS


def _reasons(cls: type[CheckpointError]) -> set[str]:
    return {cls.reason}.union(*(_reasons(sub) for sub in cls.__subclasses__()))


_CHECKPOINT_REASONS = frozenset(_reasons(CheckpointError) | {"unsafe_path"})
