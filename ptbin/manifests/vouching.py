"""What lies at an output's place before it is written, and whether it may be replaced.

ptbin replaces a file that a manifest next to it lists and that still has the content listed there, and a file
that already has the very bytes to be written. Anything else is `output_exists`.

A file gets its name before its manifest is written, so a run killed in between leaves a file without one. For
that moment a claim lies next to the output: a small file, which listings pass over, with size and CRC-32 of
each file of the old output and of the new one. It is written before the first of them gets its name, and
deleted once the manifest is there. It vouches as a manifest does.

Objects of S3 need no such file where nothing is to be replaced: each carries its claim in its metadata, which
goes when another program writes the object. It names the place and the source, and vouches where no manifest
is: for a rerun only.

Content is recognised by the identity that the manifest has recorded (ETag, modification time): only where
that differs, or is unknown, is a file read.

Costs: a write and a deletion, of the claim file where there is one. Unless a listing has shown that the place
is free, also one read of the manifest, and one stat for each file to be written that the listing does not
tell about; one HEAD for each file that only its own claim can vouch for.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ptbin.errors import (
    LimitExceededError,
    NotFoundInStoreError,
    OutputExistsError,
    VerificationError,
)
from ptbin.manifests.claims import (
    MAX_CLAIM_NBYTES,
    Vouched,
    carried_claim,
    claim_place,
    dump_claim,
    end_claim,
    is_restored,
    rows_of_claim,
    vouched_by,
)
from ptbin.manifests.damage import DAMAGED
from ptbin.manifests.manifest import MANIFEST_SUFFIX, dump_manifest, hex_crc32, parse_manifest
from ptbin.manifests.provenance import STATEMENT_SUFFIX, dump_statement, statement_of
from ptbin.stores import Place, identity_text
from ptbin.stores.faults import fault
from ptbin.values.crc32 import crc32_of

CHUNK_NBYTES = 4 << 20

Guard = Literal["any", "restored"]
"""Which manifests vouch: each of ptbin's, or only those of `restore`."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a listing of DEST has shown at an output's own name; size None: nothing lies there.

    `alone`: nor anywhere else where a file of this output may go, its manifest's place included.
    """

    size: int | None
    identity: str = ""
    """As `manifest.identity_text` writes it."""
    alone: bool = False
    is_known_copy: bool = False
    """What is there is a copy that ptbin has made, as its index of finished work says."""


class OutputSite:
    """Where one output goes, with the files and the manifest that are there now."""

    def __init__(
        self,
        place: Place,
        guard: Guard | None,
        *,
        standing: Standing | None = None,
        restores: bool = False,
        source_uri: str = "",
        damaged: Mapping[str, Any] | None = None,
    ) -> None:
        """`guard` None: everything may be replaced. `restores`: what is written is a restored output.

        Args:
            source_uri: what it is made of, for the claims that objects carry; empty: they carry none.
            damaged: of a dry run, what the run would have noted in the manifest by then (`damage`).
        """
        self.place = place
        self._folder, self._name = place.parent, place.name
        self._guard = guard
        self._restores = restores or guard == "restored"
        self._is_local = place.is_local
        self.claim = ""
        """What each file of the output is to carry, where the store has a place for it."""
        if place.store.carries_claims and source_uri:
            self.claim = carried_claim(place.uri, source_uri, self._restores)
        self._is_free = standing is not None and standing.size is None and standing.alone
        # Looking at a local file costs next to nothing, and is surer than a listing of some time ago.
        self._standing = standing if not self._is_local else None
        self._claimed: list[Vouched] = []
        self._has_claim = self._looked_for_claim = False
        self._is_withdrawn = False
        self._read: dict[tuple[str, str], tuple[str, str]] = {}
        self._settled: set[str] = set()
        self.replaced: dict[str, bool] = {}
        """Names of files that are there and may be replaced; true: only if they are the new ones already."""
        self._foreign_manifest = ""
        if self._is_local:
            self._is_there(self._manifest_place)  # before gigabytes are written that could never count
        self.manifest = self._read_manifest()
        """The manifest that is there."""
        if self.manifest is not None and damaged:
            self.manifest[DAMAGED] = {"files": dict(damaged)}

    def _read_manifest(self) -> dict[str, Any] | None:
        if self._is_free:
            return None
        try:
            manifest = parse_manifest(self._manifest_place.read_bytes(), self.place.uri)
            if "provenance" not in manifest:
                # Only a statement says something of tensors; a million rows would stay for all the run.
                manifest["tensors"] = []
            return manifest
        except NotFoundInStoreError:
            return None
        except (VerificationError, LimitExceededError):
            self._foreign_manifest = "what is there, at the manifest's place, is not a manifest of ptbin's"
            return None

    @property
    def _manifest_place(self) -> Place:
        return self.place.beside(MANIFEST_SUFFIX)

    def place_of(self, name: str) -> Place:
        """Of a file of the output."""
        return self._folder / name

    @staticmethod
    def _is_there(place: Place) -> bool:
        """Whether a local file is. Raises StorageError: none can have this name."""
        try:
            os.lstat(place.path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise fault(error, "write", place.uri) from error
            return False
        return True

    # -- may it be replaced --------------------------------------------------------------------------

    def check_vouched(self) -> None:
        """Refuse early, before the output's size is known.

        Raises:
            OutputExistsError: a file is at the output's own name that is not vouched for.
        """
        self.check(self._name, -1)

    def check(self, name: str, size: int, crc32: int | None = None) -> None:
        """Refuse to write a file of that size over one that is not vouched for.

        Args:
            name: of the file, in the output's folder.
            crc32: of what is to be written; None before that is known. Then only a file that has another
                size than `size`, and is not vouched for, is refused.

        Raises:
            OutputExistsError: something else lies there.
        """
        if self._foreign_manifest and self._guard is not None:
            self._refuse(self._manifest_place, self._foreign_manifest)
        if name in self._settled:
            return
        place = self.place_of(name)
        if self._is_free and not (self._is_local and self._is_there(place)):
            return
        try:
            found, identity = self._stat(place, name)
        except NotFoundInStoreError:
            if not self._is_local:
                self._settled.add(name)
            return
        if self._guard is None:
            self.replaced[name] = False
            return
        reason = self._objection(place, name, found, identity)
        if not reason:
            self.replaced[name] = False
            if not self._is_local:
                self._settled.add(name)
            return
        if found == size and (crc32 is None or self._crc32(place) == crc32):
            self.replaced[name] = True
            return
        self._refuse(place, f"a file of {found} bytes is there, {reason}")

    def check_statement(self) -> None:
        """As `check`, for the statement of where the output comes from, which no manifest lists."""
        name = self._name + STATEMENT_SUFFIX
        if self._is_free or self._guard is None:
            return
        place = self.place.beside(STATEMENT_SUFFIX)
        try:
            there = place.read_bytes()
        except NotFoundInStoreError:
            return
        except LimitExceededError:
            there = b""
        manifest = self.manifest
        if manifest is not None and "provenance" in manifest and there == _statement(manifest):
            self.replaced[name] = False
            return
        self._look_for_claim()
        crc32 = hex_crc32(crc32_of(there))
        claimed = any(
            row.name == name and row.size == len(there) and row.crc32 == crc32 for row in self._claimed
        )
        if claimed or self._carries_our_claim(place):
            self.replaced[name] = False
            return
        self._refuse(place, "a file is there, and it is not the statement of the manifest next to it")

    def _refuse(self, place: Place, what: str) -> None:
        raise OutputExistsError(
            f"{place.uri}: {what}; move it away, choose another DEST, or replace it with --force"
        )

    def _stat(self, place: Place, name: str) -> tuple[int, str]:
        if self._standing is not None and name == self._name:
            if self._standing.size is None:
                raise NotFoundInStoreError(place.uri)
            return self._standing.size, self._standing.identity
        found = place.stat()
        return found.size, identity_text(found.identity)

    def _objection(self, place: Place, name: str, size: int, identity: str) -> str:
        """Why the file may not be replaced; empty where it may."""
        reason = "and no manifest of ptbin's vouches for it"
        listed: list[Vouched] = []
        if self.manifest is not None:
            listed = [row for row in vouched_by(self.manifest) if row.name == name]
            if not self._may_vouch(self.manifest):
                listed, reason = [], "and its manifest does not say that ptbin restored it"
            elif not listed:
                reason = "and the manifest next to it does not list it"
            else:
                made = "restored" if is_restored(self.manifest) else "converted"
                reason = f"and it is no longer what ptbin {made}: its manifest lists other content"
        if self._has_content(place, size, identity, listed):
            return ""
        self._look_for_claim()
        claimed = [row for row in self._claimed if row.name == name]
        if self._has_content(place, size, identity, claimed) or self._carries_our_claim(place):
            return ""
        return reason

    def _carries_our_claim(self, place: Place) -> bool:
        """Whether a run before this one wrote what is there, and then no manifest any more."""
        return bool(self.claim) and self.manifest is None and place.store.claim_of(place.path) == self.claim

    def _may_vouch(self, manifest: Mapping[str, Any]) -> bool:
        return not self._restores or is_restored(manifest)

    def vouches_for(self, name: str) -> bool:
        """Whether the manifest lists a file that is there, with its content."""
        if self.manifest is None:
            return False
        place = self.place_of(name)
        try:
            found = place.stat()
        except NotFoundInStoreError:
            return False
        rows = [row for row in vouched_by(self.manifest) if row.name == name]
        return self._has_content(place, found.size, identity_text(found.identity), rows)

    def has_own_statement(self) -> bool:
        """Whether the statement beside the output is the one of the manifest that is there."""
        try:
            there = self.place.beside(STATEMENT_SUFFIX).read_bytes()
        except (NotFoundInStoreError, LimitExceededError):
            return False
        return self.manifest is not None and there == _statement(self.manifest)

    def has_manifest_beside(self, name: str) -> bool:
        """Whether a file is an output by itself."""
        try:
            self.place_of(name + MANIFEST_SUFFIX).stat()
        except NotFoundInStoreError:
            return False
        return True

    def _has_content(self, place: Place, size: int, identity: str, rows: Iterable[Vouched]) -> bool:
        rows = [row for row in rows if row.size == size]
        if not rows:
            return False
        if identity and any(row.identity == identity for row in rows):
            return True
        crc32, sha256 = self._digests(place, identity)
        return any(row.sha256 == sha256 or (row.sha256 is None and row.crc32 == crc32) for row in rows)

    def _digests(self, place: Place, identity: str) -> tuple[str, str]:
        if identity and (known := self._read.get((place.path, identity))) is not None:
            return known
        crc, digest = 0, hashlib.sha256()
        with place.open_reader() as reader:
            for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
                crc = crc32_of(piece, crc)
                digest.update(piece)
        self._read[place.path, identity] = hex_crc32(crc), digest.hexdigest()
        return self._read[place.path, identity]

    def _crc32(self, place: Place) -> int:
        crc = 0
        with place.open_reader() as reader:
            for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
                crc = crc32_of(piece, crc)
        return crc

    # -- the claim -----------------------------------------------------------------------------------

    def _look_for_claim(self) -> None:
        """Read the claim that a run before this one may have left."""
        if self._looked_for_claim:
            return
        self._looked_for_claim = True
        try:
            claim = json.loads(claim_place(self.place).read_bytes(limit=MAX_CLAIM_NBYTES))
        except (NotFoundInStoreError, LimitExceededError, ValueError, RecursionError):
            return
        rows = rows_of_claim(claim, restored=self._guard == "restored")
        self._claimed += [row for row in rows if row not in self._claimed]

    def withdraw_manifest(self, *coming: tuple[str, int, int]) -> None:
        """Claim the place for files that are about to get their names: (name, size, CRC-32) of each.

        The manifest is removed: it must not vouch for another output, not even for an instant.
        """
        if not self._has_claim and not self._is_free and self.manifest is None:
            # What a run before this one has claimed and not finished stays claimed.
            self._look_for_claim()
        if self.claim and self.manifest is None and not self._claimed:
            return  # the files carry it
        if self.manifest is not None and not self._has_claim and self._may_vouch(self.manifest):
            self._claimed += vouched_by(self.manifest)
        rows = [Vouched(name, size, None, hex_crc32(crc32)) for name, size, crc32 in coming]
        fresh = [row for row in rows if row not in self._claimed]
        self._claimed += fresh
        if fresh or not self._has_claim:
            # Where a power failure takes a claim on new files alone, a rerun still finds the very bytes that
            # it would write, and that is allowed without one. A restored module may come out otherwise.
            lasting = self._restores or any(row not in rows for row in self._claimed)
            claim_place(self.place).write_bytes(dump_claim(self._claimed, self._restores), lasting=lasting)
            self._has_claim = True
        if self.manifest is not None and not self._is_withdrawn:
            self._manifest_place.delete()
        self._is_withdrawn = True

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Publish the new output: its manifest, and then the end of the claim."""
        self._manifest_place.write_bytes(dump_manifest(manifest))
        if self._has_claim:
            end_claim(self.place)

    @property
    def has_claim(self) -> bool:
        """Whether a claim was written, to be deleted by the caller once the new manifest is there."""
        return self._has_claim


def _statement(manifest: Mapping[str, Any]) -> bytes:
    try:
        return dump_statement(statement_of(manifest))
    except (LookupError, TypeError):
        return b""
