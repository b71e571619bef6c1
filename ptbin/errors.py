"""Every problem ptbin reports, as one tree.

The branch says where to look for the cause: the checkpoint (`CheckpointError`, permanent, never retried), the
store (`StorageError`, retried where `transient`), the caller (`UsageError`) or nobody, because what
is stored is not what the source says (`VerificationError`). Each class carries the stable `reason`
code that manifests, run records and `--json` summaries print; messages may change, codes may not.
"""

from __future__ import annotations

from typing import ClassVar


class PtbinError(Exception):
    """Base of everything ptbin raises on purpose."""

    reason: ClassVar[str] = "error"


class CheckpointError(PtbinError):
    """The checkpoint itself is at fault: trying again gives the same answer."""

    reason = "bad_checkpoint"


class CorruptArchiveError(CheckpointError, ValueError):
    """Structure that contradicts itself or ends early: zip directory, pickle stream, storage sizes.

    `program` is set where a pickle broke: what it had named until then (`reading.pickle_machine`).
    """

    reason = "corrupt_archive"
    program: object | None = None


class ChecksumMismatchError(CheckpointError, ValueError):
    """Bytes whose CRC-32 is not the one that the source states for them."""

    reason = "checksum_mismatch"


class UnsafePickleError(CheckpointError, ValueError):
    """A pickle that names what can only be meant to run code, or that hides from parsers."""

    reason = "unsafe_pickle"


class NoStateDictError(CheckpointError, LookupError):
    """A readable file in which no mapping of names to tensors was found.

    `leftover` is set where the content is what training leaves next to weights (`optimizer`, say).
    """

    reason = "no_state_dict"
    leftover: str | None = None


class AmbiguousStateDictError(CheckpointError, LookupError):
    """Several state dicts, and no rule that prefers one; `candidates` are paths for `--select`."""

    reason = "ambiguous_state_dict"

    def __init__(self, message: str, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.candidates = candidates


class UnsupportedFormatError(CheckpointError, ValueError):
    """A container that ptbin recognises, or fails to recognise, and does not read."""

    reason = "unsupported_format"


class NotACheckpointError(UnsupportedFormatError):
    """Content that is no checkpoint container of any kind.

    Bulk runs skip such a file where only its place made it a candidate (an unknown suffix).
    """


class EmptyFileError(NotACheckpointError):
    """A file of no bytes: a marker, or what an interrupted copy left."""

    reason = "corrupt_archive"


class UnsupportedTensorError(CheckpointError, ValueError):
    """A tensor whose weights cannot be taken as plain bytes (nested, distributed, wrapper subclass)."""

    reason = "unsupported_tensor"


class IncompleteCheckpointError(CheckpointError, LookupError):
    """One part of a checkpoint whose other parts lie elsewhere: other ranks, shards, slices, experts."""

    reason = "incomplete_checkpoint"


class ModelMismatchError(CheckpointError, ValueError):
    """Weights that do not fit the model they are to be loaded into: the message lists every key."""

    reason = "model_mismatch"


class SourceChangedError(CheckpointError, RuntimeError):
    """The source is no longer the object that was read first."""

    reason = "source_changed"


class OutputCollisionError(CheckpointError, ValueError):
    """Two sources map to one output, or two tensors to one name."""

    reason = "output_collision"


class OutputExistsError(CheckpointError, FileExistsError):
    """At the output's place lies a file that no manifest of ptbin's vouches for; it is left as it is."""

    reason = "output_exists"


class LimitExceededError(CheckpointError, ValueError):
    """The file asks for more memory, opcodes, members or elements than it may.

    `limit` is the field of `Limits` that raises it, where there is one.
    """

    reason = "limit_exceeded"

    def __init__(self, message: str, *, limit: str = "") -> None:
        super().__init__(message + (f" (from Python, Limits({limit}=...) raises it)" if limit else ""))


class StorageError(PtbinError, OSError):
    """A store did not do what was asked. `transient` says whether asking again may help."""

    reason = "storage_error"

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient

    def __reduce__(self) -> tuple[object, ...]:
        # OSError's own reduction would drop the keyword and refuse to come back from a worker process.
        return (_rebuild_storage_error, (type(self), str(self), self.transient))


class NotFoundInStoreError(StorageError, FileNotFoundError):
    """The path, bucket or prefix does not exist."""


class NoSpaceError(StorageError):
    """The disk is full, or a quota is used up: what else is written there would fail as well."""


class AccessDeniedError(StorageError, PermissionError):
    """The store refuses these credentials, or this user."""


def _rebuild_storage_error(cls: type[StorageError], message: str, transient: bool) -> StorageError:
    return cls(message, transient=transient)


class UsageError(PtbinError, ValueError):
    """The call itself is wrong; nothing was written."""

    reason = "usage_error"


class DestinationBusyError(UsageError):
    """Another run works on this destination."""

    reason = "destination_busy"


class VerificationError(PtbinError, ValueError):
    """What is stored is not what the source or the manifest says it should be."""

    reason = "verification_failed"


def short_detail(path: str, detail: str) -> str:
    """A message without the URI that it begins with, for a line that has named `path` already."""
    head, colon, rest = detail.partition(": ")
    return rest if colon and head.endswith(path) else detail
