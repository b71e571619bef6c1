"""Progress on standard error: a live bar on a terminal, plain lines elsewhere.

Both count files and bytes. How many bytes of a file will be moved is not known before its index is
read, so the bar counts whole files by their size as they are done, and the bytes moved stand beside it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from flows.cli.printing import print_error, printable
from flows.cli.shared_options import Shared
from flows.units import format_nbytes, short_detail
from ptbin.installed import is_installed
from tasks.live import Listener, Settled

__all__ = ["BarProgress", "JsonLines", "PlainProgress", "Problems", "showing_progress"]

LINE_SECONDS = 5.0


class Problems(Listener):
    """Tells of problems and of nothing else: what `--quiet` leaves."""

    def stage(self, text: str) -> None:
        """Say what is being waited for before anything can be counted."""

    def __init__(self) -> None:
        self.told: set[tuple[str, str]] = set()
        """Reason and detail of the problems that were printed: the summary does not print them again."""
        self.leaves_them = False
        """Whether problems are left to the report at the end, which is what the command is for."""

    def settled(self, file: Settled) -> None:
        if file.reason and not self.leaves_them:
            self.told.add((file.reason, file.detail))
            self.tell(f"{file.kind} {file.path}: {file.reason}: {short_detail(file.path, file.detail)}")

    def noted(self, text: str) -> None:
        self.tell(text)

    def tell(self, text: str) -> None:
        print_error(text, kind="ptbin")


class PlainProgress(Problems):
    """A line now and then; with `each` also one for every file that is done."""

    def __init__(self, *, each: bool = False) -> None:
        super().__init__()
        self._each = each
        self._lock = threading.Lock()
        self._files = self._files_done = self._nbytes_moved = 0
        self._told_at = time.monotonic()

    def stage(self, text: str) -> None:
        self.tell(text)

    def planned(self, files: int, nbytes: int, up_to_date: int) -> None:
        self._files = files
        self._told_at = time.monotonic()
        if files == 1:
            return  # one file is the call itself; it is news only where it takes long
        size = f", {format_nbytes(nbytes)}" if nbytes else ""
        done = f"; {up_to_date} up to date" if up_to_date else ""
        self.tell(f"{files} files to work on{size}{done}")

    def moved(self, nbytes: int) -> None:
        with self._lock:
            self._nbytes_moved += nbytes
        self._tell_sometimes()

    def settled(self, file: Settled) -> None:
        super().settled(file)
        if self._each and not file.reason:
            self.tell(_checkpoint_line(file))
        with self._lock:
            self._files_done += 1
        self._tell_sometimes()

    def _tell_sometimes(self) -> None:
        with self._lock:
            now = time.monotonic()
            if self._files == 0 or now < self._told_at + LINE_SECONDS:
                return
            self._told_at = now
            text = f"{self._files_done} of {self._files} files, {format_nbytes(self._nbytes_moved)} moved"
        self.tell(text)


class BarProgress(Problems):
    """A live bar, drawn by rich. Problems are counted here; the summary, right below, tells them."""

    def __init__(self, progress: Any, *, each: bool = False) -> None:
        super().__init__()
        self._each = each
        self._progress = progress
        self._task = progress.add_task("starting", total=None, moved="")
        self._lock = threading.Lock()
        self._files = self._files_done = self._nbytes = self._nbytes_done = self._nbytes_moved = 0
        self._problems = 0

    def stage(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def planned(self, files: int, nbytes: int, up_to_date: int) -> None:
        del up_to_date
        self._files, self._nbytes = files, nbytes
        # A single file has no half-way mark: what of it will be moved is known only when it is done.
        self._progress.update(self._task, total=None if files == 1 else nbytes or files)
        self._draw()

    def moved(self, nbytes: int) -> None:
        with self._lock:
            self._nbytes_moved += nbytes
        self._draw()

    def settled(self, file: Settled) -> None:
        if self._each and not file.reason:
            self.tell(_checkpoint_line(file))
        with self._lock:
            self._files_done += 1
            self._nbytes_done += file.nbytes
            self._problems += bool(file.reason)
        self._draw()

    def tell(self, text: str) -> None:
        self._progress.console.print(
            f"ptbin: {printable(text)}", markup=False, highlight=False, soft_wrap=True
        )

    def _draw(self) -> None:
        problems = f", {self._problems} with problems" if self._problems else ""
        self._progress.update(
            self._task,
            description=f"{self._files_done} of {self._files} file{'s' if self._files != 1 else ''}",
            completed=self._nbytes_done if self._nbytes else self._files_done,
            moved=f"{format_nbytes(self._nbytes_moved)} moved{problems}",
        )


class JsonLines(Problems):
    """Every event as a JSON object on a line of its own, for a log collector."""

    def stage(self, text: str) -> None:
        self._print("stage", message=text)

    def planned(self, files: int, nbytes: int, up_to_date: int) -> None:
        self._print("planned", files=files, source_bytes=nbytes, up_to_date=up_to_date)

    def settled(self, file: Settled) -> None:
        problem = {"reason": file.reason, "detail": file.detail} if file.reason else {}
        self._print(
            "checkpoint",
            level="warning" if problem else "info",
            path=file.path,
            outcome=file.kind,
            seconds=round(file.seconds, 4),
            source_bytes=file.nbytes,
            read_bytes=file.read_nbytes,
            written_bytes=file.written_nbytes,
            **problem,
        )

    def tell(self, text: str) -> None:
        self._print("message", level="warning", message=text)

    def _print(self, event: str, *, level: str = "info", **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": now, "level": level, "event": event, **facts})
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - a whole line at once, from any thread


def _checkpoint_line(file: Settled) -> str:
    """One file that went well, for people."""
    written = f", {format_nbytes(file.written_nbytes)} written" if file.written_nbytes else ""
    size = format_nbytes(file.nbytes)
    return f"{file.kind.replace('_', ' ')} {file.path} ({size}{written}) in {file.seconds:.2f} s"


@contextlib.contextmanager
def showing_progress(shared: Shared) -> Iterator[Problems]:
    """The listener that fits the options and the terminal."""
    each = shared.log_level in {"debug", "info"}
    if shared.log_format == "json":
        yield JsonLines()
    elif shared.quiet:
        yield Problems()
    elif shared.live_bar and is_installed("rich"):
        with _rich_progress() as progress:
            yield BarProgress(progress, each=each)
    else:
        yield PlainProgress(each=each)


def _rich_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[moved]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
