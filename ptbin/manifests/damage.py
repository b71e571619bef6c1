"""A note in a manifest that files of its output are no longer what it says, as `verify` found them.

An output with such a note is not up to date: the next `convert` or `sync` makes it anew, and may replace
the very content that was found damaged (`vouching`). What the manifest states about the output stays. Costs a
read and a write of the manifest, only where damage was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptbin.errors import LimitExceededError, StorageError, VerificationError
from ptbin.manifests.manifest import dump_manifest, parse_manifest, utc_now
from ptbin.stores import ObjectStat, Place, identity_text

DAMAGED = "damaged"


def is_damaged(manifest: Mapping[str, Any]) -> bool:
    """Whether files of the output were found damaged."""
    return DAMAGED in manifest


def damaged_file(found: ObjectStat, sha256: str | None) -> dict[str, Any]:
    """What is there in place of a file: its size, state, and SHA-256 where it was read."""
    return {"size": found.size, "identity": identity_text(found.identity), "sha256": sha256}


def note_damage(place: Place, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Note damage in the manifest there, by name of each file; whether that could be done.

    A store that may not be written, or a manifest that is another one by now, is left as it is.
    """
    try:
        data, seen = place.read_identified()
        manifest = parse_manifest(data, place.uri)
        manifest[DAMAGED] = {"found": utc_now(), "files": dict(files)}
        if place.stat().identity != seen:
            return False
        place.write_bytes(dump_manifest(manifest))
    except (StorageError, VerificationError, LimitExceededError):
        return False
    return True
