"""How far a run has come, how fast it goes and how long it may still take: numbers in, one line out. Pure.

Files count by their size in SOURCE, when they are done. Of those under way only the bytes moved so far are
known, and how many a file takes is not: weights may be a third of it, and are read back as well. So what is
under way counts by the ratio of the files before it, and by none while no file is done. A single file
therefore has a rate, and neither a percentage nor a remaining time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptbin.runs.units import counted, format_nbytes, format_seconds

UNDER_WAY_SHARE = 0.99
"""What files under way come to at most, of what is left: they are not done."""


@dataclass(frozen=True, slots=True)
class _Position:
    """Where a run is at one moment. Bytes are of SOURCE, but for `moved_nbytes`."""

    files: int
    files_done: int
    nbytes: int
    nbytes_done: int
    moved_nbytes: int
    problems: int
    seconds: float

    @property
    def share(self) -> float | None:
        """Of the whole, from 0 to 1; None where it is not known."""
        if self.nbytes:
            return self.nbytes_done / self.nbytes if self.files > 1 or self.files_done else None
        return self.files_done / self.files if self.files else None

    @property
    def nbytes_per_second(self) -> float | None:
        """Bytes of SOURCE a second; bytes moved where those are not known."""
        done = self.nbytes_done or self.moved_nbytes
        return done / self.seconds if done and self.seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        share = self.share
        return self.seconds * (1 - share) / share if share else None

    def to_json(self) -> dict[str, Any]:
        share, rate, left = self.share, self.nbytes_per_second, self.seconds_left
        return {
            "files": self.files,
            "files_done": self.files_done,
            "source_bytes": self.nbytes,
            "source_bytes_done": self.nbytes_done,
            "moved_bytes": self.moved_nbytes,
            "problems": self.problems,
            "percent": None if share is None else round(100 * share, 1),
            "bytes_per_second": None if rate is None else round(rate),
            "seconds_left": None if left is None else round(left, 1),
        }

    def __str__(self) -> str:
        """`12 of 40 files, 31 %, 1.20 of 3.90 GiB, 210 MiB/s, 13 s left, 1 problem`."""
        return f"{self.files_words()}, {self.words()}"

    def files_words(self) -> str:
        return f"{self.files_done} of {counted(self.files, 'file')}"

    def words(self) -> str:
        """The same without the files."""
        parts = []
        if (share := self.share) is not None:
            parts.append(f"{int(100 * share)} %")
        if self.nbytes_done:
            parts.append(_of(self.nbytes_done, self.nbytes))
        else:
            parts.append(f"{format_nbytes(self.moved_nbytes)} moved")
        if (rate := self.nbytes_per_second) is not None:
            parts.append(f"{format_nbytes(rate)}/s")
        if (left := self.seconds_left) is not None and self.files_done < self.files:
            parts.append(f"{format_seconds(left)} left")
        else:
            parts.append(format_seconds(self.seconds))
        if self.problems:
            parts.append(counted(self.problems, "problem"))
        return ", ".join(parts)


def _of(done: int, whole: int) -> str:
    """`1.20 of 3.90 GiB`."""
    done_text, whole_text = format_nbytes(done), format_nbytes(whole)
    unit = whole_text[whole_text.index(" ") :]
    return f"{done_text.removesuffix(unit)} of {whole_text}"


class Pace:
    """Counts what a run reports, from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._began = clock()
        self._files = self._files_done = self._nbytes = self._nbytes_settled = 0
        self._moved = self._moved_when_settled = self._problems = self._nbytes_shown = 0

    def planned(self, files: int, nbytes: int) -> None:
        with self._lock:
            self._began = self._clock()
            self._files, self._nbytes = files, nbytes

    def moved(self, nbytes: int) -> None:
        with self._lock:
            self._moved += nbytes

    def settled(self, nbytes: int, *, problem: bool) -> None:
        with self._lock:
            self._files_done += 1
            self._nbytes_settled += nbytes
            self._moved_when_settled = self._moved
            self._problems += problem

    def now(self) -> _Position:
        with self._lock:
            self._nbytes_shown = max(self._nbytes_shown, self._nbytes_settled + self._under_way())
            return _Position(
                self._files,
                self._files_done,
                self._nbytes,
                min(self._nbytes_shown, self._nbytes),
                self._moved,
                self._problems,
                self._clock() - self._began,
            )

    def _under_way(self) -> int:
        """What files that are not done come to, in bytes of SOURCE."""
        if not self._nbytes_settled or not self._moved_when_settled:
            return 0
        ratio = self._nbytes_settled / self._moved_when_settled
        most = UNDER_WAY_SHARE * max(self._nbytes - self._nbytes_settled, 0)
        return int(min(ratio * (self._moved - self._moved_when_settled), most))
