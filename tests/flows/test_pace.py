"""The numbers of the progress: percent, rate, remaining time, files and bytes of the source."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from flows.cli.pace import Pace
from flows.cli.progress import BarProgress, JsonLines, _rich_progress
from ptbin.runs.outcomes import Outcome

MIB = 1 << 20


class Clock:
    """Monotonic seconds, set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_percent_rate_and_remaining_time_are_of_the_sources_bytes(clock: Clock) -> None:
    pace = Pace(clock)
    clock.now += 30  # looking at SOURCE, which is no part of the pace
    pace.planned(4, 100 * MIB)
    pace.moved(20 * MIB)
    pace.settled(25 * MIB, problem=False)
    clock.now += 10
    assert str(pace.now()) == "1 of 4 files, 25 %, 25.0 of 100 MiB, 2.50 MiB/s, 30.0 s left"
    pace.settled(25 * MIB, problem=True)
    clock.now += 10
    assert str(pace.now()) == ("2 of 4 files, 50 %, 50.0 of 100 MiB, 2.50 MiB/s, 20.0 s left, 1 problem")


def test_what_is_under_way_counts_by_the_files_before_it_and_never_goes_back(clock: Clock) -> None:
    pace = Pace(clock)
    pace.planned(2, 200 * MIB)
    pace.moved(40 * MIB)
    assert pace.now().nbytes_done == 0  # how much a file takes is not known yet
    pace.settled(100 * MIB, problem=False)
    pace.moved(20 * MIB)
    clock.now += 10
    assert pace.now().nbytes_done == 150 * MIB
    pace.moved(1000 * MIB)  # this file is all weights
    assert pace.now().nbytes_done == 199 * MIB
    pace.settled(100 * MIB, problem=False)
    assert str(pace.now()) == "2 of 2 files, 100 %, 200 of 200 MiB, 20.0 MiB/s, 10.0 s"


def test_a_single_file_has_a_rate_and_no_percentage(clock: Clock) -> None:
    pace = Pace(clock)
    pace.planned(1, 100 * MIB)
    pace.moved(30 * MIB)
    clock.now += 3
    assert str(pace.now()) == "0 of 1 file, 30.0 MiB moved, 10.0 MiB/s, 3.0 s"


def test_without_sizes_files_count(clock: Clock) -> None:
    pace = Pace(clock)
    pace.planned(10, 0)
    for _ in range(4):
        pace.moved(MIB)
        pace.settled(0, problem=False)
    clock.now += 8
    assert str(pace.now()) == "4 of 10 files, 40 %, 4.00 MiB moved, 512 KiB/s, 12.0 s left"


def test_nothing_to_do_is_no_division_by_zero(clock: Clock) -> None:
    pace = Pace(clock)
    pace.planned(0, 0)
    assert pace.now().share is None
    assert pace.now().seconds_left is None


def test_a_terminal_of_eighty_columns_shows_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("flows.cli.progress.Pace", lambda: Pace(clock))
    console = Console(width=80, force_terminal=True, color_system=None)
    bar = _rich_progress()
    progress = BarProgress(bar)
    progress.planned(40, 400 * MIB, 3)
    for number in range(12):
        clock.now += 1
        progress.moved(8 * MIB)
        progress.settled(
            Outcome(f"{number}.pt", "converted", "corrupt_archive" * (number < 2), nbytes=10 * MIB)
        )
    with console.capture() as shown:
        console.print(bar.get_renderable())
    (line,) = shown.get().splitlines()
    for part in ("12 of 40 files", "30 %", "120 of 400 MiB", "10.0 MiB/s", "28.0 s left", "2 problems"):
        assert part in line


def test_json_lines_tell_the_same_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("flows.cli.progress.Pace", lambda: Pace(clock))
    monkeypatch.setattr("flows.cli.progress.time.monotonic", clock)
    lines = JsonLines()
    lines.planned(2, 100 * MIB, 0)
    lines.settled(Outcome("a.pt", "converted", nbytes=25 * MIB))
    clock.now += 10
    lines.moved(0)
    *_, told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert told["event"] == "progress"
    assert (told["percent"], told["files_done"], told["files"]) == (25.0, 1, 2)
    assert (told["source_bytes_done"], told["source_bytes"]) == (25 * MIB, 100 * MIB)
    assert (told["bytes_per_second"], told["seconds_left"]) == (25 * MIB // 10, 30.0)
