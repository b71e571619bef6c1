"""What people know of: failures that were acknowledged, until a day, in `DEST/_ptbin/known.json`.

`ptbin acknowledge` writes the file, and so may people; runs only read it. A file that is damaged acknowledges
nothing, and is an error that names the entry: half a list would turn nights red or green by chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from typing import Any, Protocol

from ptbin.catalog.finding import OWN_FOLDER
from ptbin.errors import NotFoundInStoreError, VerificationError
from ptbin.stores import Where, place_of

KNOWN = f"{OWN_FOLDER}/known.json"
SCHEMA_VERSION = 1


class Failure(Protocol):
    """What is acknowledged: a file that was not converted."""

    @property
    def path(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """A failure that someone knows of: until then it does not make a run fail.

    Attributes:
        path: of the checkpoint below SOURCE, or its URI.
        because: what reports say.
        until: the last day (UTC) on which it holds, as `YYYY-MM-DD`.
        state: of the checkpoint; None, where written by hand: whatever its state is.
        reason: the reason code; None, where written by hand: any reason.
        at: when it was acknowledged.
    """

    path: str
    because: str
    until: str
    state: str | None = None
    reason: str | None = None
    at: str = ""

    def covers(self, failure: Failure, today: date) -> bool:
        return (
            self.path in (failure.path, failure.source)
            and self.state in (None, failure.state)
            and self.reason in (None, failure.reason)
            and not self.is_expired(today)
        )

    def is_expired(self, today: date) -> bool:
        return date.fromisoformat(self.until) < today

    @classmethod
    def from_json(cls, data: Any) -> Acknowledgement:
        """Raises ValueError where something is missing, unknown or of the wrong kind."""
        if not isinstance(data, dict):
            raise ValueError(f"{data!r} is not an object with path, because and until")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(data.keys() - known):
            raise ValueError(f"{data!r} has a field {unknown[0]!r}; fields are {', '.join(known)}")
        for name in ("path", "because", "until"):
            if not isinstance(data.get(name), str):
                raise ValueError(f"{data!r} has no text {name!r}")
        if not all(value is None or isinstance(value, str) for value in data.values()):
            raise ValueError(f"{data!r} has a field that is not text")
        try:
            date.fromisoformat(data["until"])
        except ValueError as error:
            raise ValueError(f"{data!r} has no day as 'until', such as '2027-01-15'") from error
        return cls(**data)


def read_known(dest: Where) -> list[Acknowledgement]:
    """Everything acknowledged, expired or not; nothing where there is no such file.

    Raises:
        VerificationError: the file is damaged, or was edited into something else.
        StorageError: the store failed.
    """
    place = place_of(dest) / KNOWN
    try:
        data = place.read_bytes()
    except NotFoundInStoreError:
        return []
    try:
        return [Acknowledgement.from_json(item) for item in _entries(json.loads(data))]
    except (ValueError, RecursionError) as error:
        raise VerificationError(
            f"{place.uri} is not a list of acknowledged failures: {error}; mend it, or delete the file"
        ) from error


def _entries(document: Any) -> list[Any]:
    entries = document.get("known") if isinstance(document, dict) else None
    if isinstance(document, dict) and document.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        version = document["schema_version"]
        raise ValueError(f"it is of schema version {version!r}, and this ptbin reads {SCHEMA_VERSION}")
    if not isinstance(entries, list):
        raise ValueError('expected {"schema_version": 1, "known": [...]}')
    return entries


def write_known(dest: Where, known: Iterable[Acknowledgement]) -> None:
    """Put these in the place of all that were stored. Of two writers at once, the last one's stay."""
    rows = [
        {name: value for name, value in asdict(item).items() if value is not None}
        for item in sorted(known, key=lambda item: item.path)
    ]
    text = json.dumps({"schema_version": SCHEMA_VERSION, "known": rows}, indent=2, ensure_ascii=False)
    # What a shell hands over may be no text; JSON takes it escaped.
    (place_of(dest) / KNOWN).write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")
