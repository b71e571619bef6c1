"""The values that a run is made of: what was found, what becomes of it, what went wrong. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from ptbin.errors import CheckpointError, NotACheckpointError
from ptbin.manifests.vouching import Standing
from ptbin.sources.leftovers import left_alone_as
from ptbin.stores import Identity


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
    """One checkpoint, or another file, and where its output goes."""

    source_uri: str
    source_size: int
    dest_uri: str
    path: str
    certain: bool
    identity: Identity | None
    copies: bool = False
    """The file itself goes along, as it is (a mirror's other files)."""
    standing: Standing | None = None
    """What a listing of DEST has shown at `dest_uri`; None: it was not listed."""

    @property
    def output_name(self) -> str:
        return self.dest_uri.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Problem:
    """A checkpoint that was not converted, with the stable reason code."""

    source: str
    reason: str
    detail: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def problem_of(source: str, error: Exception) -> Problem:
    """An error of one checkpoint as a row of the summary; foreign errors become `internal_error`."""
    reason = getattr(error, "reason", None)
    if not isinstance(reason, str):
        return Problem(source, "internal_error", f"{type(error).__name__}: {error}")
    return Problem(source, reason, str(error))


def passed_over_as(
    job: Job, error: Exception
) -> tuple[Literal["not_a_checkpoint", "left_alone"], str] | None:
    """What a candidate is that cannot be converted and need not be, with its role; None: it is a problem.

    Only its place made it a candidate (a directory holds other things too), or it is what training leaves
    next to weights.
    """
    if isinstance(error, NotACheckpointError):
        return None if job.certain else ("not_a_checkpoint", "")
    role = left_alone_as(job.path, error)
    return ("left_alone", role) if role is not None else None


def is_rejection(reason: str) -> bool:
    """Whether a problem's reason speaks of the checkpoint itself, not of a store or of the proof."""
    return reason in _CHECKPOINT_REASONS


def _reasons(cls: type[CheckpointError]) -> set[str]:
    return {cls.reason}.union(*(_reasons(sub) for sub in cls.__subclasses__()))


_CHECKPOINT_REASONS = frozenset(_reasons(CheckpointError) | {"unsafe_path"})
