"""What stores say of objects: frozen values and the checks on them. Knows no store and reads nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from ptbin.errors import CorruptArchiveError, LimitExceededError, SourceChangedError

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB = 1 << 20

PARTIAL_SUFFIX = ".ptbin-partial"
"""Last part of every temporary name; listings pass such names over, so no output is ever taken from one."""

NAME_MAX = 255
"""Longest file name in bytes on every usual Linux filesystem (limits.h)."""

READ_BYTES_LIMIT = 256 * MIB

IdentityKind = Literal["etag", "version_id", "mtime", "checksum", "uid", "parts"]


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one state of an object from another: equal where nothing was written in between.

    An `etag` is written without its quotes; an `mtime` is "<nanoseconds or ISO time>-<size>".
    """

    kind: IdentityKind
    value: str

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, "value": self.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Identity:
        """Raises ValueError where `data` is not what `to_json` writes (a manifest edited by hand)."""
        kind, value = data.get("kind"), data.get("value")
        if kind not in get_args(IdentityKind) or not isinstance(value, str):
            raise ValueError(f"{dict(data)!r} is not an object's identity (kind and value)")
        return cls(cast("IdentityKind", kind), value)


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What a store says of one object; `size` in bytes."""

    uri: str
    size: int
    identity: Identity


@dataclass(frozen=True, slots=True)
class ListedObject:
    """One line of a recursive listing; `path` is relative to the listed root, '/'-separated.

    On object stores `path` is whatever the key says: it may hold `..` or `//`, and must be checked
    before it becomes a path anywhere else.
    """

    path: str
    uri: str
    size: int
    identity: Identity | None


def partial_name(path: str) -> str:
    """A temporary name next to `a/b.bin`: `a/.b.bin.<12 digits>.ptbin-partial`; a long one is cut short."""
    folder, slash, name = path.rpartition("/")
    ending = f".{os.urandom(6).hex()}{PARTIAL_SUFFIX}"
    kept = os.fsencode(name)[: NAME_MAX - len(ending) - 1].decode(errors="ignore")
    return f"{folder}{slash}.{kept}{ending}"


def target_of_partial(path: str) -> str:
    """Where the output of that partial name was to go, as far as its name was not cut short."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.removesuffix(PARTIAL_SUFFIX).rpartition(".")[0].removeprefix(".")


def is_partial_name(path: str) -> bool:
    """Whether the last part of `path` is a temporary name of an unfinished output."""
    return path.endswith(PARTIAL_SUFFIX)


def check_range(uri: str, size: int, offset: int, nbytes: int) -> None:
    """Refuse a range that does not lie in the object; such ranges come from a damaged index.

    Raises:
        CorruptArchiveError: any part of the range is outside of the object's `size` bytes.
    """
    if offset < 0 or nbytes < 0 or offset + nbytes > size:
        raise CorruptArchiveError(
            f"bytes {offset} to {offset + nbytes} were asked of {uri}, which holds {size}: "
            "its index points outside of it, or the file was cut short"
        )


def refuse_other_object(uri: str, found: Identity, expected: Identity) -> None:
    """Raises SourceChangedError where `found` is not `expected`."""
    if found != expected:
        raise SourceChangedError(
            f"{uri} is not the object seen first: found {found.kind} {found.value}, "
            f"expected {expected.value}; convert it again once nothing writes to it"
        )


def refuse_too_large(uri: str, size: int, limit: int) -> None:
    """Raises LimitExceededError for an object that is to be held in memory and is too large for it."""
    if size > limit:
        raise LimitExceededError(f"{uri} holds {size} bytes; at most {limit} are read into memory at once")


def identity_text(identity: Identity | None) -> str:
    """An object's state as one text; empty where the store names none: such are never recognised."""
    return f"{identity.kind}:{identity.value}" if identity is not None and identity.value else ""
