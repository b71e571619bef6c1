"""What lies at an output's place before it is written, and whether it may be replaced.

ptbin replaces what a manifest next to it vouches for: a file that the manifest lists and that still has the
content listed there. It also replaces a file that already has the very bytes to be written, which is what a
killed run leaves. Anything else is `output_exists`. While an output is replaced its manifest is set aside, so
that a run killed at that moment leaves something that vouches for the old file.

Costs: one read of the manifest, one stat for each file to be written, and a read of each file to be replaced.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any, Literal

from ptbin.errors import LimitExceededError, NotFoundInStoreError, OutputExistsError, VerificationError
from ptbin.manifest import MANIFEST_SUFFIX, dump_manifest, hex_crc32, parse_manifest
from ptbin.stores import PARTIAL_SUFFIX, Store

__all__ = ["ASIDE_SUFFIX", "Guard", "Place", "is_restored"]

Guard = Literal["any", "restored"]
"""Which manifests vouch: each of ptbin's, or only those of `restore`."""

ASIDE_SUFFIX = f"{MANIFEST_SUFFIX}.before.kept{PARTIAL_SUFFIX}"
"""Of a manifest whose output is being replaced. Listings pass it over; no clean-up takes it for an output."""

CHUNK_NBYTES = 4 << 20


def is_restored(manifest: Mapping[str, Any]) -> bool:
    """Whether `restore` wrote the manifest: only then does what its output holds lie elsewhere as well."""
    return isinstance(manifest["options"].get("restore"), dict)


class Place:
    """The place of one output, with the files and the manifest that are there now."""

    def __init__(self, store: Store, path: str, guard: Guard | None, *, is_free: bool = False) -> None:
        """`guard` None: everything may be replaced. `is_free`: nothing lies there, as a listing has shown."""
        self.store, self.path = store, path
        self._folder = path.rpartition("/")[0]
        self._guard = guard
        self._is_free = is_free
        self._was_aside = False
        self.manifest = self._read(MANIFEST_SUFFIX)
        """The manifest there, or the one that was set aside; the latter from the first `check` on."""
        self._looked_aside = self.manifest is not None

    def _read(self, suffix: str) -> dict[str, Any] | None:
        try:
            return parse_manifest(self.store.read_bytes(self.path + suffix), self.path)
        except (NotFoundInStoreError, VerificationError, LimitExceededError):
            return None

    def check_vouched(self) -> None:
        """Refuse early, before the output's size is known, unless a killed run may have left what is there.

        Raises:
            OutputExistsError: a file is at the output's own name that is not vouched for.
        """
        if self.manifest is None:
            self._look_aside()
        if not self._was_aside:
            self.check(self.path.rpartition("/")[2], -1)

    def _look_aside(self) -> None:
        if not self._looked_aside:
            self._looked_aside = True
            self.manifest = self._read(ASIDE_SUFFIX)
            self._was_aside = self.manifest is not None

    def check(self, name: str, size: int, crc32: int | None = None) -> None:
        """Refuse to write a file of that size over one that is not vouched for.

        Args:
            name: of the file, in the output's folder.
            crc32: of what is to be written; None before that is known. Then only a file that has another
                size than `size`, and is not vouched for, is refused.

        Raises:
            OutputExistsError: something else lies there.
        """
        if self._guard is None or self._is_free:
            return
        path = f"{self._folder}/{name}"
        try:
            found = self.store.stat(path).size
        except NotFoundInStoreError:
            return
        self._look_aside()
        reason = self._objection(path, name, found)
        if not reason:
            return
        if found == size and (crc32 is None or self._crc32(path) == crc32):
            return
        raise OutputExistsError(
            f"{self.store.uri_of(path)}: a file of {found} bytes is there, {reason}; move it away, choose "
            "another DEST, or replace it with --force"
        )

    def _objection(self, path: str, name: str, size: int) -> str:
        """Why the file may not be replaced; empty where it may."""
        manifest = self.manifest
        if manifest is None:
            return "and no manifest of ptbin's vouches for it"
        if self._guard == "restored" and not is_restored(manifest):
            return "and its manifest does not say that ptbin restored it"
        listed = next((output for output in manifest["outputs"] if output["path"] == name), None)
        if listed is None:
            return "and the manifest next to it does not list it"
        if self._guard == "restored" and (size != listed["size"] or not self._has_content(path, listed)):
            return "and it is no longer what ptbin restored: its manifest lists other content"
        return ""

    def _has_content(self, path: str, listed: Mapping[str, Any]) -> bool:
        if listed.get("sha256") is None:
            return hex_crc32(self._crc32(path)) == listed.get("crc32")
        digest = hashlib.sha256()
        with self.store.open_reader(path) as reader:
            for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
                digest.update(piece)
        return bool(digest.hexdigest() == listed["sha256"])

    def _crc32(self, path: str) -> int:
        crc = 0
        with self.store.open_reader(path) as reader:
            for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
                crc = zlib.crc32(piece, crc)
        return crc

    def withdraw_manifest(self, coming: Mapping[str, Any] | None = None) -> None:
        """Remove the manifest: it must not vouch for another output, not even for an instant.

        `coming`: the next one, set aside where there is none yet, for outputs that a rerun may not write in
        the same bytes again.
        """
        aside = self.manifest if self.manifest is not None else coming
        if self._guard is not None and aside is not None and not self._was_aside:
            self.store.write_bytes(self.path + ASIDE_SUFFIX, dump_manifest(aside))
            self._was_aside = True
        self.store.delete(self.path + MANIFEST_SUFFIX)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Publish the new output: its manifest, and then the end of the one that was set aside."""
        self.store.write_bytes(self.path + MANIFEST_SUFFIX, dump_manifest(manifest))
        if self._was_aside:
            self.store.delete(self.path + ASIDE_SUFFIX)

    @property
    def has_aside(self) -> bool:
        """Whether there is a manifest set aside, to be removed by whoever writes the new one."""
        return self._was_aside
