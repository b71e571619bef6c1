"""What vouches for the files of an output: rows of its manifest, or a claim until that is written.

A claim is a small file next to the output, or a text that each object carries. `vouching` says when one is
made and what it is worth.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ptbin.errors import StorageError
from ptbin.manifests.damage import DAMAGED
from ptbin.manifests.manifest import MANIFEST_SUFFIX, hex_crc32
from ptbin.stores import PARTIAL_SUFFIX, Place

ASIDE_SUFFIX = f"{MANIFEST_SUFFIX}.before.kept{PARTIAL_SUFFIX}"
"""Of a claim's name, behind its output's. Listings pass it over; no clean-up takes it for an output."""

CLAIM_TARGET_SUFFIX = f"{MANIFEST_SUFFIX}.before"
"""What a store takes for the end of the output's name that a claim, a partial name, was to get."""

CLAIM_VERSION = 1
MAX_CLAIM_NBYTES = 64 << 20
NAME_MAX = 255
"""Longest file name in bytes (limits.h)."""


def claim_place(output: Place) -> Place:
    """Where the claim on an output lies."""
    name = output.name
    if len(name.encode("utf-8", "surrogateescape")) + len(ASIDE_SUFFIX) > NAME_MAX:
        name = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return output.parent / f"{name}{ASIDE_SUFFIX}"


def end_claim(output: Place) -> None:
    """Delete the claim of an output, once its manifest is there or its files are gone.

    One that stays behind is hidden and harmless: a store's fault is passed over.
    """
    with contextlib.suppress(StorageError):
        claim_place(output).delete()


def is_restored(manifest: Mapping[str, Any]) -> bool:
    """Whether `restore` wrote the manifest: only then does what its output holds lie elsewhere as well."""
    return isinstance(manifest["options"].get("restore"), dict)


@dataclass(frozen=True, slots=True)
class Vouched:
    """Content of one file that a manifest or a claim vouches for."""

    name: str
    size: int
    sha256: str | None
    crc32: str | None
    identity: str = ""


def carried_claim(uri: str, source_uri: str, restored: bool) -> str:
    """The claim that an S3 object carries in its metadata: 32 hexadecimal digits of place and source."""
    text = "\0".join((str(CLAIM_VERSION), "restored" if restored else "converted", uri, source_uri))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def vouched_by(manifest: Mapping[str, Any]) -> list[Vouched]:
    """The files that a manifest lists, and what `verify` found damaged in their place."""
    identities = manifest["verification"].get("identities")
    if not isinstance(identities, dict):
        identities = {}
    return [
        Vouched(
            output["path"],
            output["size"],
            output.get("sha256"),
            output.get("crc32"),
            str(identities.get(output["path"], "")),
        )
        for output in manifest["outputs"]
    ] + _damaged_rows(manifest)


def _damaged_rows(manifest: Mapping[str, Any]) -> list[Vouched]:
    """What `verify` found in the place of files of the output: it may be replaced, for no output has it."""
    files = manifest.get(DAMAGED, {}).get("files") if isinstance(manifest.get(DAMAGED), dict) else None
    if not isinstance(files, dict):
        return []
    return [
        Vouched(name, file["size"], file.get("sha256") or "", None, str(file.get("identity", "")))
        for name, file in files.items()
        if isinstance(file, dict) and isinstance(file.get("size"), int)
    ]


def claim_of(files: Iterable[tuple[str, int, int]], *, restored: bool) -> bytes:
    """A claim on files of which name, size and CRC-32 are given, as it is stored."""
    return dump_claim([Vouched(name, size, None, hex_crc32(crc)) for name, size, crc in files], restored)


def dump_claim(rows: Iterable[Vouched], restored: bool) -> bytes:
    listed = [[row.name, row.size, row.sha256, row.crc32, row.identity] for row in rows]
    return json.dumps({"claim": CLAIM_VERSION, "restored": restored, "files": listed}).encode()


def rows_of_claim(claim: Any, *, restored: bool) -> list[Vouched]:
    """Nothing where it is not one; of a conversion's, nothing for a restore."""
    if not isinstance(claim, dict) or claim.get("claim") != CLAIM_VERSION:
        return []
    if restored and claim.get("restored") is not True:
        return []
    return [
        Vouched(row[0], row[1], row[2], row[3], str(row[4]))
        for row in claim.get("files") or ()
        if isinstance(row, list) and len(row) == 5 and isinstance(row[0], str) and type(row[1]) is int
    ]
