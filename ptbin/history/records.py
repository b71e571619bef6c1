"""The run records of a destination: `DEST/_ptbin/runs/<run id>/run.json`, newest first.

A record of a large run holds a row for each checkpoint and may be hundreds of megabytes long. Its counts
come first, so the first `HEAD_NBYTES` are enough for the history. Costs one listing of `_ptbin/runs`, and one
read for each run that is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ptbin.catalog.finding import OWN_FOLDER
from ptbin.errors import LimitExceededError, NotFoundInStoreError, StorageError, UsageError
from ptbin.stores import Place, Where, place_of

RUNS_FOLDER = f"{OWN_FOLDER}/runs"
RECORD_NAME = "run.json"
HEAD_NBYTES = 1 << 16

_STAMP = re.compile(r"\d{8}T\d{6}Z-")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One run, as far as its record tells.

    Attributes:
        run_id: the name of its folder.
        facts: the fields of the record that come before its long lists; empty where it is unreadable.
        problem: why it is unreadable; empty where it is not.
    """

    run_id: str
    facts: Mapping[str, Any]
    problem: str = ""

    def text(self, name: str) -> str:
        value = self.facts.get(name)
        return value if isinstance(value, str) else ""

    def number(self, name: str) -> float:
        """0 where the record has no such number."""
        value = self.facts.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else 0

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.facts.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def succeeded(self) -> bool:
        """Whether its exit status was 0. Records of early versions do not say it; their counts do."""
        if isinstance(said := self.facts.get("succeeded"), bool):
            return said
        bad = sum(self.number(name) for name in ("rejected", "failed", "not_tried"))
        return not (self.problem or bad or self.facts.get("interrupted"))

    @property
    def began(self) -> str:
        """UTC time in ISO 8601; of early versions' records, by the run id; empty where neither says it."""
        if said := self.text("began"):
            return said
        if not _STAMP.match(self.run_id):
            return ""
        stamp = self.run_id
        return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]}T{stamp[9:11]}:{stamp[11:13]}:{stamp[13:15]}Z"


def iter_runs(
    dest: Where, *, last: int | None = None, storage_options: Mapping[str, Any] | None = None
) -> Iterator[RecordedRun]:
    """The runs recorded below DEST, newest first, at most `last`. Each is read when it is asked for.

    Run ids begin with the time unless a caller named the run; such names come behind the others, in the
    reverse order of their names.

    Raises:
        UsageError: DEST does not exist, or is one file.
        StorageError: the store failed.
    """
    root = place_of(dest, storage_options)
    if not root.is_directory():
        raise UsageError(f"no destination with runs in it: {dest} is not a directory or prefix")
    folder = root / RUNS_FOLDER
    names = [
        item.path.removesuffix(f"/{RECORD_NAME}")
        for item in folder.iter_objects()
        if item.path.count("/") == 1 and item.path.endswith(f"/{RECORD_NAME}")
    ]
    names.sort(key=lambda name: (_STAMP.match(name) is not None, name), reverse=True)
    for name in names[:last]:
        yield _read_run(folder / name / RECORD_NAME, name)


def _read_run(place: Place, run_id: str) -> RecordedRun:
    try:
        with place.open_reader() as reader:
            text = reader.read(0, min(reader.size, HEAD_NBYTES)).decode("utf-8", errors="replace")
    except StorageError as error:
        return RecordedRun(run_id, {}, str(error))
    facts = parse_head(text)
    if not isinstance(facts.get("run_id"), str):
        return RecordedRun(run_id, {}, "it is not a run record")
    return RecordedRun(run_id, facts)


def parse_head(text: str) -> dict[str, Any]:
    """The fields of a JSON object, of which the end may be cut off: as many as are there whole. Pure."""
    found: dict[str, Any] = {}
    decoder = json.JSONDecoder()
    at = _after_space(text, 0)
    if not text.startswith("{", at):
        return found
    at = _after_space(text, at + 1)
    try:
        while text.startswith('"', at):
            name, at = decoder.raw_decode(text, at)
            at = _after_space(text, at)
            if not text.startswith(":", at):
                break
            value, at = decoder.raw_decode(text, _after_space(text, at + 1))
            at = _after_space(text, at)
            if not text.startswith((",", "}"), at):
                break  # a number may have been cut in two
            found[name] = value
            at = _after_space(text, at + 1)
    except (ValueError, RecursionError):
        pass
    return found


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match is not None else at


def read_rows(dest: Where, run_id: str) -> list[Mapping[str, Any]]:
    """The rows of the checkpoints of one run; its record is read whole.

    Raises:
        UsageError: there is no such run, or its record is damaged or too large to be held in memory.
        StorageError: the store failed.
    """
    if "/" in run_id:
        raise UsageError(f"{run_id!r} is not the id of a run; `ptbin runs {dest}` lists them")
    place = place_of(dest) / RUNS_FOLDER / run_id / RECORD_NAME
    try:
        rows = json.loads(place.read_bytes())["checkpoints"]
    except NotFoundInStoreError as error:
        raise UsageError(
            f"no run {run_id} is recorded below {dest}; `ptbin runs {dest}` lists them"
        ) from error
    except (ValueError, LookupError, TypeError, RecursionError, LimitExceededError) as error:
        raise UsageError(f"the record of run {run_id} below {dest} cannot be read: {error}") from error
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("path"), str)]
