"""Progress on standard error: a live bar on a terminal, plain lines elsewhere, JSON lines where asked for.

All show the same numbers, those of `flows.cli.pace`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flows.cli.command import Shared
from flows.cli.pace import Pace
from flows.cli.printing import log_line, print_error, printable
from ptbin.errors import short_detail
from ptbin.installed import is_installed
from ptbin.runs.units import format_nbytes
from tasks.live import Listener

if TYPE_CHECKING:
    from ptbin.runs.outcomes import Outcome

LINE_SECONDS = 5.0


class Problems(Listener):
    """Prints problems and nothing else: what `--quiet` leaves."""

    def stage(self, text: str) -> None:
        """What the run waits for, before anything can be counted."""

    def __init__(self) -> None:
        self.reported: set[tuple[str, str]] = set()
        """Reason and detail of the problems that were printed: the summary does not print them again."""
        self.leaves_them = False
        """Whether problems are left to the report at the end, which is what the command is for."""

    def settled(self, entry: Outcome) -> None:
        # Known failures are not news: the summary lists them, with what the acknowledgement says.
        if entry.reason and entry.kind != "known" and not self.leaves_them:
            self.reported.add((entry.reason, entry.detail))
            self.report(
                f"{entry.kind} {entry.path}: {entry.reason}: {short_detail(entry.path, entry.detail)}"
            )

    def noted(self, text: str) -> None:
        self.report(text)

    def report(self, text: str) -> None:
        print_error(text, kind="ptbin")


class _Counting(Problems):
    """Keeps count, and shows it."""

    def __init__(self, *, each: bool = False) -> None:
        super().__init__()
        self._each = each
        self._pace = Pace()

    def planned(self, files: int, nbytes: int, up_to_date: int) -> None:
        del up_to_date
        self._pace.planned(files, nbytes)
        self._show()

    def moved(self, nbytes: int) -> None:
        self._pace.moved(nbytes)
        self._show()

    def settled(self, entry: Outcome) -> None:
        self._pace.settled(entry.nbytes, problem=bool(entry.reason))
        self._show()

    def _show(self) -> None:
        raise NotImplementedError


class _Timer:
    """Due once every few seconds, for one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due_since = time.monotonic()

    def is_due(self) -> bool:
        with self._lock:
            now = time.monotonic()
            if now < self._due_since + LINE_SECONDS:
                return False
            self._due_since = now
            return True


class PlainProgress(_Counting):
    """A line now and then; with `each` also one for every file that is done."""

    def __init__(self, *, each: bool = False) -> None:
        super().__init__(each=each)
        self._timer = _Timer()

    def stage(self, text: str) -> None:
        self.report(text)

    def planned(self, files: int, nbytes: int, up_to_date: int) -> None:
        self._timer = _Timer()
        super().planned(files, nbytes, up_to_date)
        if files == 1:
            return  # one file is the call itself; it is news only where it takes long
        size = f", {format_nbytes(nbytes)}" if nbytes else ""
        done = f"; {up_to_date} up to date" if up_to_date else ""
        self.report(f"{files} files to work on{size}{done}")

    def settled(self, entry: Outcome) -> None:
        Problems.settled(self, entry)
        if self._each and not entry.reason:
            self.report(entry.line())
        super().settled(entry)

    def _show(self) -> None:
        if self._timer.is_due() and (position := self._pace.now()).files:
            self.report(str(position))


class BarProgress(_Counting):
    """A live bar, drawn by rich. Problems are only counted here: the summary, right below, lists them."""

    def __init__(self, progress: Any, *, each: bool = False) -> None:
        super().__init__(each=each)
        self._progress = progress
        self._task = progress.add_task("starting", total=None, position="")

    def stage(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def settled(self, entry: Outcome) -> None:
        if self._each and not entry.reason:
            self.report(entry.line())
        super().settled(entry)

    def report(self, text: str) -> None:
        self._progress.console.print(
            f"ptbin: {printable(text)}", markup=False, highlight=False, soft_wrap=True
        )

    def _show(self) -> None:
        position = self._pace.now()
        share = position.share
        self._progress.update(
            self._task,
            description=position.files_words(),
            total=None if share is None else 1.0,
            completed=share or 0.0,
            position=position.words(),
        )


class JsonLines(_Counting):
    """Every event as a JSON object on one line, for a log collector."""

    def __init__(self) -> None:
        super().__init__()
        self._timer = _Timer()

    def stage(self, text: str) -> None:
        self._print("stage", message=text)

    def planned(self, files: int, nbytes: int, up_to_date: int) -> None:
        self._print("planned", files=files, source_bytes=nbytes, up_to_date=up_to_date)
        super().planned(files, nbytes, up_to_date)

    def settled(self, entry: Outcome) -> None:
        problem = {"reason": entry.reason, "detail": entry.detail} if entry.reason else {}
        self._print(
            "checkpoint",
            level="warning" if problem else "info",
            path=entry.path,
            outcome=entry.kind,
            seconds=round(entry.seconds, 4),
            source_bytes=entry.nbytes,
            read_bytes=entry.read_nbytes,
            written_bytes=entry.written_nbytes,
            **problem,
        )
        super().settled(entry)

    def _show(self) -> None:
        if self._timer.is_due():
            self._print("progress", **self._pace.now().to_json())

    def report(self, text: str) -> None:
        self._print("message", level="warning", message=text)

    def _print(self, event: str, *, level: str = "info", **facts: Any) -> None:
        line = log_line(event, level, **facts)
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - a whole line at once, from any thread


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
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=8 if console.width < 100 else 28),  # the rest fits into 80 columns with 8
        TextColumn("{task.fields[position]}"),
        console=console,
        transient=True,
    )
