"""What is new, old, known and resolved, by the state of a checkpoint and the reason of its failure."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from flows.cli.app import run
from ptbin.catalog import Job, Problem
from ptbin.errors import UsageError, VerificationError
from ptbin.history.failures import (
    Ledger,
    Unconverted,
    acknowledge,
    read_ledger,
    read_unconverted,
    write_unconverted,
    written_at,
)
from ptbin.history.known import Acknowledgement, read_known
from ptbin.runs.outcomes import Outcome
from ptbin.runs.tally import Tally
from ptbin.stores import Identity

NOW = datetime(2026, 11, 10, 2, 0, tzinfo=UTC)
BEFORE = Unconverted(
    *("/in/cut.pt", "cut.pt", "/in", "etag:1", "rejected", "corrupt_archive", "why"),
    since="2026-11-03T02:00:00Z",
    run="r3",
)


def job(path: str = "cut.pt", etag: str = "1") -> Job:
    return Job(f"/in/{path}", 10, f"/out/{path}.bin", path, True, Identity("etag", etag))


def tally(*known: Acknowledgement, before: Unconverted | None = BEFORE, **settings: Any) -> Tally:
    rows = {before.source: before} if before is not None else {}
    return Tally("r", "/in", "/out", ledger=Ledger("r10", "/in", rows, known, NOW), **settings)


def known(**changes: Any) -> Acknowledgement:
    facts = {"path": "cut.pt", "because": "we know", "until": "2026-11-10"} | changes
    return Acknowledgement(**facts)


@pytest.mark.parametrize(
    ("etag", "reason", "novelty", "since"),
    [
        ("1", "corrupt_archive", "old", "2026-11-03"),
        ("2", "corrupt_archive", "new", "2026-11-10"),
        ("1", "no_state_dict", "new", "2026-11-10"),
    ],
)
def test_a_failure_is_old_in_the_same_state_with_the_same_reason(
    etag: str, reason: str, novelty: str, since: str
) -> None:
    entry = tally().add(job(etag=etag), Outcome("cut.pt", "rejected", reason, "why"))
    assert (entry.novelty, entry.since[:10], entry.kind) == (novelty, since, "rejected")


@pytest.mark.parametrize(
    ("acknowledged", "is_known"),
    [
        (known(), True),
        (known(path="/in/cut.pt"), True),
        (known(state="etag:1", reason="corrupt_archive"), True),
        (known(until="2026-11-09"), False),
        (known(state="etag:0"), False),
        (known(reason="no_state_dict"), False),
        (known(path="other.pt"), False),
    ],
)
def test_what_is_acknowledged_makes_no_run_fail_until_it_expires_or_changes(
    acknowledged: Acknowledgement, is_known: bool
) -> None:
    found = tally(acknowledged)
    entry = found.add(job(), Outcome("cut.pt", "rejected", "corrupt_archive", "why"))
    assert found.succeeded == is_known
    summary = found.summary(1)
    assert (summary["known"], summary["rejected"]) == (is_known, not is_known)
    assert entry.kind == ("known" if is_known else "rejected")
    assert [row["source"] for row in summary["known_problems"]] == (["/in/cut.pt"] if is_known else [])
    assert ("known failures 1" in found.message()) == is_known


def test_new_failures_are_told_first() -> None:
    found = tally()
    found.add(job(), Outcome("cut.pt", "rejected", "corrupt_archive", "why"))
    found.add(job("zz.pt"), Outcome("zz.pt", "failed", "storage_error", "why"))
    summary = found.summary(1)
    assert [(row["source"], row["novelty"]) for row in summary["problems"]] == [
        ("/in/zz.pt", "new"),
        ("/in/cut.pt", "old"),
    ]
    assert summary["new"] == 1


@pytest.mark.parametrize(("share", "well"), [(None, False), (0.75, True), (0.76, False)])
def test_a_run_succeeds_with_the_share_that_was_asked_for(share: float | None, well: bool) -> None:
    found = tally(before=None, min_success=share)
    found.add_all([job(str(number)) for number in range(3)], "up_to_date")
    found.add(job(), Outcome("cut.pt", "rejected", "corrupt_archive", "why"))
    assert (found.succeeded, found.is_clean) == (well, False)
    found.add_all([job("left")], "not_tried")
    assert not found.succeeded


def test_a_share_covers_no_problem_of_the_run_itself() -> None:
    found = tally(min_success=0.01)
    found.run_problems.append(Problem("/out", "run_stopped", "deadline"))
    assert not found.succeeded


def test_what_a_run_did_not_look_at_stays_and_what_it_settled_is_resolved() -> None:
    other = Unconverted("/in/x", "x", "/in", "", "not_a_checkpoint")
    ledger = Ledger("r", "/in", {"/in/cut.pt": BEFORE, "/in/x": other}, (), NOW)
    assert ledger.close(lambda row: False) == [BEFORE, other]
    assert ledger.resolved == []
    assert ledger.close(lambda row: True) == []
    assert ledger.resolved == [BEFORE]


def test_rows_come_back_as_they_were_and_damaged_lines_cost_themselves(tmp_path: Path) -> None:
    write_unconverted(str(tmp_path), [BEFORE, Unconverted("/in/x", "x", "/in", "", "not_a_checkpoint")])
    path = tmp_path / "_ptbin/unconverted.jsonl"
    path.write_bytes(b'{"source":3}\n[]\nnonsense\n' + path.read_bytes() + b'{"source":"half')
    assert [row.path for row in read_unconverted(str(tmp_path))] == ["cut.pt", "x"]
    assert read_ledger(str(tmp_path)).before["/in/cut.pt"] == BEFORE
    assert list(read_unconverted(str(tmp_path / "nowhere"))) == []


def test_an_acknowledgement_holds_for_this_state_and_reason(tmp_path: Path) -> None:
    write_unconverted(str(tmp_path), [BEFORE])
    day: dict[str, Any] = {"because": "again", "until": "2026-12-31", "today": date(2026, 11, 10)}
    with pytest.raises(UsageError, match=r"nothing fails at other\.pt"):
        acknowledge(str(tmp_path), ["cut.pt", "other.pt"], **day)
    assert read_known(str(tmp_path)) == []
    assert acknowledge(str(tmp_path), ["cut.pt"], **day) == [BEFORE]
    assert acknowledge(str(tmp_path), ["/in/cut.pt"], **day) == [BEFORE]  # in the place of the first
    (only,) = read_known(str(tmp_path))
    assert (only.path, only.state, only.reason) == ("/in/cut.pt", "etag:1", "corrupt_archive")


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("./cut.pt", "cut.pt"),
        ("in/cut.pt", "{folder}/in/cut.pt"),
        ("in/../in/cut.pt", "{folder}/in/cut.pt"),
        ("odd\udcff\n.pt", r"odd\xff\n.pt"),
        (r"odd\xff\n.pt", r"odd\xff\n.pt"),
    ],
)
def test_a_failure_is_named_as_people_and_shells_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, kept: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        Unconverted(f"{tmp_path}/in/{name}", name, f"{tmp_path}/in", "", "rejected", "unsafe_path")
        for name in ("cut.pt", r"odd\xff\n.pt")
    ]
    write_unconverted(str(tmp_path), rows)
    acknowledge(str(tmp_path), [path], because="\udcff", until="2026-12-31", today=date(2026, 11, 10))
    (only,) = read_known(str(tmp_path))
    assert only.path == kept.format(folder=tmp_path)


ENTRY = '"path": "x", "because": "y"'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Expecting value"),
        ("[]", 'expected {"schema_version": 1, "known": [...]}'),
        ('{"known": {"x": "y"}}', 'expected {"schema_version": 1, "known": [...]}'),
        ('{"schema_version": 2, "known": []}', "it is of schema version 2, and this ptbin reads 1"),
        ('{"known": [3]}', "3 is not an object with path, because and until"),
        ('{"known": [{"path": "x"}]}', "has no text 'because'"),
        (f'{{"known": [{{{ENTRY}, "until": "2027-01-01", "colour": "red"}}]}}', "has a field 'colour'"),
        (f'{{"known": [{{{ENTRY}, "until": "31.12.2026"}}]}}', "has no day as 'until', such as '2027-01-15'"),
        (f'{{"known": [{{{ENTRY}, "until": "2027-01-01", "state": 5}}]}}', "has a field that is not text"),
    ],
)
def test_a_list_of_what_is_known_that_was_edited_wrongly_says_where(
    tmp_path: Path, text: str, told: str
) -> None:
    (tmp_path / "_ptbin").mkdir()
    (tmp_path / "_ptbin/known.json").write_text(text)
    with pytest.raises(VerificationError, match="mend it, or delete the file") as caught:
        read_ledger(str(tmp_path))
    assert told in str(caught.value)


def test_what_is_acknowledged_to_no_effect_is_told_with_the_reason() -> None:
    entries = [
        known(),
        known(path="cut.pt", until="2026-11-09"),
        known(path="cut.pt", state="etag:0"),
        known(path="./cut.pt"),
    ]
    found = Ledger(before={"/in/cut.pt": BEFORE}, known=entries, now=NOW).idle()
    assert found == [
        (entries[1], "its last day is over"),
        (entries[2], "what fails there now is another"),
        (entries[3], "nothing fails there"),
    ]


def test_the_command_acknowledges_what_fails_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_unconverted(str(tmp_path), [BEFORE])
    words = ["acknowledge", str(tmp_path), "cut.pt", "--reason", "issue 412", "--until"]
    assert run([*words, "2020-01-01"]) == 2
    assert run([*words, "soon"]) == 2
    assert run(["acknowledge", str(tmp_path), "cut.pt", "--reason", " ", "--until", "2999-12-31"]) == 2
    assert run(["acknowledge", str(tmp_path / "no"), "x", "--reason", "y", "--until", "2999-12-31"]) == 2
    assert "no destination with runs in it" in capsys.readouterr().err
    assert run([*words, "2999-12-31", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["known"] == [{"path": "cut.pt", "source": "/in/cut.pt", "reason": "corrupt_archive"}]
    assert run(["acknowledge", str(tmp_path), "x", "--reason", "y", "--until", "2999-12-31"]) == 2


@pytest.mark.parametrize(
    ("state", "moment"),
    [
        ("mtime:1762740000123456789-99", "2025-11-10T02:00:00Z"),
        ("mtime:2026-11-10T02:00:00+00:00-99", "2026-11-10T02:00:00Z"),
        ("mtime:deleted", ""),
        ("mtime:99999999999999999999999999-1", ""),
        ("etag:123-4", ""),
        ("", ""),
    ],
)
def test_times_of_writing_come_from_identities_that_tell_them(state: str, moment: str) -> None:
    assert written_at(state) == moment
