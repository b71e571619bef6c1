"""What became of one thing in a batch (a checkpoint, a file, a manifest): an `Outcome`, a small frozen value.

Manifests hold a row per tensor and stay in the store; an outcome carries only what the summary, the
checksum list and the artifact need.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ptbin.catalog import Job
from ptbin.catalog.finished import FinishedRow, row_of
from ptbin.catalog.jobs import passed_over_as
from ptbin.errors import CheckpointError, NoSpaceError, OutputCollisionError, PtbinError
from ptbin.runs.retrying import is_transient
from ptbin.runs.units import format_nbytes
from ptbin.stores import Identity, identity_text

if TYPE_CHECKING:
    from ptbin.registries import Registration

Kind = Literal[
    "staged",
    "converted",
    "migrated",
    "proven",
    "updated",
    "copied",
    "deleted",
    "up_to_date",
    "changed",
    "not_a_checkpoint",
    "left_alone",
    "not_tried",
    "rejected",
    "failed",
    "known",
]
DETAIL_LENGTH = 500
NAMED_GLOBALS = 10


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One output: path relative to its manifest, size in bytes, hexadecimal SHA-256.

    Attributes:
        by_tensor: its SHA-256 was not asked for; its tensors' digests in the manifest stand for it.
    """

    path: str
    size: int
    sha256: str | None
    by_tensor: bool = False


@dataclass(frozen=True, slots=True)
class Converted:
    """The few facts of a manifest that a run keeps."""

    manifest_uri: str
    outputs: tuple[StoredFile, ...]
    tensors: int
    read_nbytes: int
    written_nbytes: int
    copied_nbytes: int = 0
    """Of what was written, what an object store copied by itself."""
    index_row: FinishedRow | None = None
    """What the index of finished work is to remember, but for the path, which only the run knows."""
    weights_nbytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Bytes of the source's tensors that did not go along, by role."""
    verdict: str = ""
    unsafe_globals: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()
    """Of a restored model: names that keep the values which its code gave them."""

    @classmethod
    def known(cls, row: FinishedRow | None) -> Converted:
        """Of an output that is up to date: nothing was read or written."""
        return cls("", (), 0, 0, 0, index_row=row)

    @classmethod
    def from_manifest(
        cls, manifest: dict[str, Any], manifest_uri: str, identity: Identity | None = None
    ) -> Converted:
        return cls(
            manifest_uri=manifest_uri,
            outputs=tuple(
                StoredFile(output["path"], int(output["size"]), output.get("sha256"), "gaps_sha256" in output)
                for output in manifest["outputs"]
            ),
            tensors=len(manifest["tensors"]),
            read_nbytes=int(manifest.get("bytes_read") or 0),
            written_nbytes=int(manifest.get("bytes_written") or 0),
            copied_nbytes=int(manifest.get("bytes_copied_in_store") or 0),
            index_row=row_of(manifest, "", identity_text(identity)) if identity is not None else None,
            weights_nbytes=sum(
                int(tensor["nbytes"]) for tensor in manifest["tensors"] if not tensor.get("shares_with")
            ),
            left_out=_left_out(manifest),
            verdict=str((manifest.get("safety") or {}).get("verdict", "")),
            unsafe_globals=tuple(
                f"{item['module']}.{item['name']}"
                for item in manifest.get("globals", ())
                if item["verdict"] == "unsafe"
            )[:NAMED_GLOBALS],
            initial=tuple(manifest.get("restored", {}).get("initial", ())),
        )


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint of a version: its path there, its size in SOURCE. `fresh`: this run converted it."""

    path: str
    nbytes: int
    converted: Converted
    fresh: bool


@dataclass(frozen=True, slots=True)
class Written:
    """The files of one version, there and proven.

    Attributes:
        registration: what registering the version takes.
        copied: how many files went along that are no checkpoints.
        left: paths of files that stay behind.
        dest_version: what the version is called, once it is registered.
    """

    registration: Registration
    parts: tuple[Part, ...] = ()
    copied: int = 0
    left: tuple[str, ...] = ()
    dest_version: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the checkpoint at `path` (below SOURCE): one value from the task to the report.

    `staged`: written, not yet proven. `left_alone`: an optimizer, a scheduler, ... (`detail` says what); not
    a fault. `known`: it failed, which is acknowledged. The last five fields are what the run adds to it.
    """

    path: str
    kind: Kind
    reason: str = ""
    detail: str = ""
    transient: bool = False
    draft: str | None = None
    converted: Converted | None = None
    seconds: float = 0.0
    """What was spent on it in this step."""
    is_full: bool = False
    """It failed because there is no room in DEST."""
    written: Written | None = None
    """Of a version of a registered model: what registering it takes, or took."""
    issues: tuple[dict[str, Any], ...] = ()
    """Of a manifest: all that was found wrong; `reason` and `detail` are the first one's."""
    digests: tuple[tuple[str, tuple[str, str]], ...] = ()
    """Of a manifest: URI of each output, and the SHA-256 and the run that it states."""
    source: str = ""
    """URI of the source."""
    nbytes: int = 0
    """Size of the source."""
    novelty: str = ""
    """Of a failure: `new`, `old` or `known`."""
    since: str = ""
    """Of a failure: when a run first found it like this."""
    because: str = ""
    """Of a known one: what its acknowledgement says, and until when it holds."""

    @property
    def read_nbytes(self) -> int:
        return self.converted.read_nbytes if self.converted is not None else 0

    @property
    def written_nbytes(self) -> int:
        return self.converted.written_nbytes if self.converted is not None else 0

    @property
    def words(self) -> str:
        """Its kind as people read it: `up to date`."""
        return self.kind.replace("_", " ")

    @property
    def age(self) -> str:
        """Of a failure, for tables: `new`, or the day since when it is like this."""
        return "new" if self.novelty == "new" else self.since[:10]

    def line(self) -> str:
        """Of what went well, for logs: `converted a.pt (1.50 MiB, 1.20 MiB written) in 0.21 s`."""
        written = f", {format_nbytes(self.written_nbytes)} written" if self.written_nbytes else ""
        detail = f"; {self.detail}" if self.detail else ""
        size = format_nbytes(self.nbytes)
        return f"{self.words} {self.path} ({size}{written}) in {self.seconds:.2f} s{detail}"

    def problem(self) -> dict[str, str]:
        """As a row of the summary."""
        row = {"source": self.source, "reason": self.reason, "detail": self.detail}
        row |= {"novelty": self.novelty, "since": self.since}
        return row | ({"because": self.because} if self.because else {})


@dataclass(frozen=True, slots=True)
class Staged:
    """What the second task of two is given: the item, and what the first one made of it."""

    item: Any
    outcome: Outcome

    @property
    def path(self) -> str:
        return self.outcome.path


def outcome_of_error(path: str, error: Exception) -> Outcome:
    """Put an error on its branch: the checkpoint's own fault is `rejected`, everything else `failed`."""
    if not isinstance(error, PtbinError):
        return Outcome(path, "failed", "internal_error", one_line(f"{type(error).__name__}: {error}"))
    rejected = isinstance(error, CheckpointError | OutputCollisionError)
    return Outcome(
        path,
        "rejected" if rejected else "failed",
        error.reason,
        one_line(str(error)),
        transient=is_transient(error),
        is_full=isinstance(error, NoSpaceError),
    )


def outcome_of_job(job: Job, error: Exception) -> Outcome:
    """As `outcome_of_error`, of a candidate that may not be a checkpoint, or not one of a model."""
    passed = passed_over_as(job, error)
    return (
        outcome_of_error(job.path, error)
        if passed is None
        else Outcome(job.path, passed[0], detail=passed[1])
    )


def _left_out(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of the source's tensors that did not go along, by what they are to a model."""
    accounting = manifest.get("accounting")
    return dict(accounting["left_out"]) if accounting else {}


def one_line(text: str, nchars: int = DETAIL_LENGTH) -> str:
    """Messages quote what files contain: keep them to one line of bounded length."""
    text = " ".join(text.split())
    return text if len(text) <= nchars else text[: nchars - 1] + "…"
