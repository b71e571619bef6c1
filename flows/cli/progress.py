"""Progress on standard error: a live bar on a terminal, plain lines elsewhere.

Both count files and bytes. How many bytes of a file will be moved is not known before its index is
read, so the bar counts whole files by their size as they are done, and the bytes moved stand beside it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from flows.cli.printing import print_error, printable
from flows.cli.shared_options import Shared
from flows.units import format_nbytes, short_detail
from tasks.live import Listener

__all__ = ["BarProgress", "PlainProgress", "Problems", "showing_progress"]

LINE_SECONDS = 5.0


class Problems(Listener):
    """Tells of problems and of nothing else: what `--quiet` leaves."""

    def stage(self, text: str) -> None:
        """Say what is being waited for before anything can be counted."""

    def settled(self, path: str, kind: str, *, nbytes: int, reason: str = "", detail: str = "") -> None:
        del nbytes
        if reason:
            self.tell(f"{kind} {path}: {reason}: {short_detail(path, detail)}")

    def tell(self, text: str) -> None:
        print_error(text, kind="ptbin")


class PlainProgress(Problems):
    """A line now and then."""

    def __init__(self) -> None:
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

    def settled(self, path: str, kind: str, *, nbytes: int, reason: str = "", detail: str = "") -> None:
        super().settled(path, kind, nbytes=nbytes, reason=reason, detail=detail)
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

    def __init__(self, progress: Any) -> None:
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

    def settled(self, path: str, kind: str, *, nbytes: int, reason: str = "", detail: str = "") -> None:
        del path, kind, detail
        with self._lock:
            self._files_done += 1
            self._nbytes_done += nbytes
            self._problems += bool(reason)
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


@contextlib.contextmanager
def showing_progress(shared: Shared) -> Iterator[Problems]:
    """The listener that fits the options and the terminal."""
    if shared.quiet:
        yield Problems()
    elif shared.live_bar:
        with _rich_progress() as progress:
            yield BarProgress(progress)
    else:
        yield PlainProgress()


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
