"""The value between the two halves of a conversion: an output that is written and not yet proven."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ptbin.options import Limits

__all__ = ["Draft", "DraftRecord"]


@dataclass(frozen=True, slots=True)
class DraftRecord:
    """One storage of an output: where it lies there, and its CRC-32 as the source states it."""

    offset: int
    nbytes: int
    crc32: int

    def holds(self, offset: int) -> bool:
        return self.offset <= offset < self.offset + max(self.nbytes, 1)


@dataclass(frozen=True, slots=True)
class Draft:
    """An output that is written and not yet proven.

    Attributes:
        manifest: everything but digests and verification.
        level: proof asked for.
        crc32: of the whole output, as computed from what the source states.
        records: every storage in the output.
    """

    source_uri: str
    dest_uri: str
    level: str
    manifest: dict[str, Any]
    size: int
    crc32: int
    records: tuple[DraftRecord, ...]
    limits: Limits

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Draft:
        data = json.loads(text)
        data["records"] = tuple(DraftRecord(**record) for record in data["records"])
        data["limits"] = Limits(**data["limits"])
        return cls(**data)
