"""The value between the two halves of a conversion: an output that is written and not yet proven."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ptbin.options import Limits


@dataclass(slots=True, unsafe_hash=True)  # not frozen, as in `values.tensors`
class DraftRecord:
    """One storage of an output file: where it lies there, and its CRC-32 as the source states it."""

    offset: int
    nbytes: int
    crc32: int

    def holds(self, offset: int) -> bool:
        return self.offset <= offset < self.offset + max(self.nbytes, 1)


@dataclass(frozen=True, slots=True)
class DraftFile:
    """One file of an output: its name next to the manifest, and what it must be.

    Attributes:
        crc32: of the whole file, as computed from what the source states.
        records: every storage in it; none in a file without weights (an index, a tokenizer).
        copied_nbytes: of the file, that the store copied by itself.
        sha256: of the whole file, where it was proven before it got its name; then the manifest has the
            tensors' digests, too.
        gaps_sha256: the same of the bytes that lie in no tensor, where the whole file's was not asked for.
        identity: which state of the file was stored (`manifest.identity_text`), where the store says it.
        acknowledged: it was proven before it was sent, and the store answered with the MD5 of it.
    """

    path: str
    size: int
    crc32: int
    records: tuple[DraftRecord, ...] = ()
    copied_nbytes: int = 0
    sha256: str | None = None
    identity: str | None = None
    gaps_sha256: str | None = None
    acknowledged: bool = False

    @property
    def is_proven(self) -> bool:
        return self.sha256 is not None or self.gaps_sha256 is not None


@dataclass(frozen=True, slots=True)
class Draft:
    """An output that is written and not yet proven.

    Attributes:
        dest_uri: name of the output; its manifest lies at this name with `.manifest.json` behind it.
        manifest: everything but digests and verification; its `outputs` stand for `files` in order.
        level: proof asked for.
        file_digest: `sha256` of whole files, or `none` (`ConvertOptions.file_digest`).
    """

    source_uri: str
    dest_uri: str
    level: str
    manifest: dict[str, Any]
    files: tuple[DraftFile, ...]
    limits: Limits
    file_digest: str = "sha256"
    claimed: bool = False
    """Whether there is a claim file at the place (`vouching`), to be deleted once the manifest is there."""
    claim: str = ""
    """What each file carries in its place."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Draft:
        data = json.loads(text)
        data["files"] = tuple(
            DraftFile(**{**file, "records": tuple(DraftRecord(**record) for record in file["records"])})
            for file in data["files"]
        )
        data["limits"] = Limits(**data["limits"])
        return cls(**data)
