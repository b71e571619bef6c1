"""The batch tasks by their plain functions: one checkpoint's fault is its outcome, never the batch's."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from ptbin import errors
from ptbin.catalog import Job
from ptbin.conversion import Published
from ptbin.options import ConvertOptions
from ptbin.runs.outcomes import Outcome, Staged, one_line, outcome_of_error
from ptbin.stores import Identity, Place
from tasks import converting, mirroring
from tasks.batches import BatchTask
from tasks.converting import convert_batch, verify_batch, verify_manifests
from tasks.credentials import Credentials
from tasks.live import (
    Interrupted,
    Listener,
    LiveRun,
    Ticket,
    enter_run,
    find_live_run,
    is_open,
    open_live_run,
)
from tasks.mirroring import back_up_batch

OPTIONS = ConvertOptions()


class Draft:
    """Stands for the engine's draft."""

    def __init__(self, text: str) -> None:
        self.text = text

    def to_json(self) -> str:
        return self.text

    @classmethod
    def from_json(cls, text: str) -> Draft:
        return cls(text)


@pytest.fixture
def live() -> Iterator[LiveRun]:
    with open_live_run(LiveRun("r", {"key": "source secret"}, {"key": "dest secret"})) as live:
        yield live


def job(path: str, *, certain: bool = True) -> Job:
    return Job(f"/src/{path}", 10, f"/out/{path}.bin", path, certain, None)


def engine(monkeypatch: pytest.MonkeyPatch, behaviour: dict[str, Exception | None]) -> list[dict[str, Any]]:
    """Let `stage` and `publish` do what `behaviour` says for a path; return the keywords of each call."""
    calls: list[dict[str, Any]] = []

    def act(path: str, keywords: dict[str, Any]) -> None:
        calls.append(keywords)
        error = behaviour.get(path.removeprefix("/src/"))
        if error is not None:
            raise error

    def stage(source: Place, dest: Place, options: ConvertOptions, **keywords: Any) -> Draft:
        act(source.uri, {"source": source, "dest": dest, **keywords})
        return Draft(source.uri)

    def publish(draft: Draft, source: Place, dest: Place, progress: Any) -> Published:
        act(draft.text, {"source": source, "dest": dest, "progress": progress})
        manifest = {
            "source": {"uri": draft.text, "size": 10, "identity": None},
            "options_fingerprint": "f",
            "verification": {"level": "checksum"},
            "outputs": [{"path": "x.bin", "size": 4, "sha256": "ab"}],
            "tensors": [{"nbytes": 2}, {"nbytes": 2}],
            "bytes_read": 5,
            "bytes_written": 4,
        }
        return Published(manifest, Identity("etag", "e"))

    monkeypatch.setattr("ptbin.runs.steps.stage", stage)
    monkeypatch.setattr("ptbin.runs.steps.publish_at", publish)
    monkeypatch.setattr("ptbin.runs.steps.Draft", Draft)
    return calls


def batch_outcomes(task: BatchTask, items: Sequence[Any], values: dict[str, Any]) -> list[Outcome]:
    return task.fn(Ticket("r"), items, values).result()


def convert(jobs: Sequence[Job]) -> list[Outcome]:
    return batch_outcomes(convert_batch, jobs, {"options": OPTIONS})


def test_each_error_becomes_the_outcome_of_its_own_checkpoint(
    live: LiveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(
        monkeypatch,
        {
            "unsafe": errors.UnsafePickleError("names os.system"),
            "gone": errors.NotFoundInStoreError("no such key"),
            "slow": errors.StorageError("503", transient=True),
            "wrong": errors.VerificationError("digest"),
            "bug": ZeroDivisionError("division by zero"),
            "text": errors.NotACheckpointError("a text file"),
        },
    )
    jobs = [job(p) for p in ("good", "unsafe", "gone", "slow", "wrong", "bug", "text", "last")]
    jobs.append(job("text", certain=False))
    found = [(outcome.kind, outcome.reason, outcome.transient) for outcome in convert(jobs)]
    assert found == [
        ("staged", "", False),
        ("rejected", "unsafe_pickle", False),
        ("failed", "storage_error", False),
        ("failed", "storage_error", True),
        ("failed", "verification_failed", False),
        ("failed", "internal_error", False),
        ("rejected", "unsupported_format", False),
        ("staged", "", False),
        ("not_a_checkpoint", "", False),
    ]


def test_a_proof_that_fails_fails_its_own_output(live: LiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch, {"bad": errors.VerificationError("digest")})
    jobs = [job("good"), job("bad")]
    staged = [Staged(one, Outcome(one.path, "staged", draft=one.source_uri)) for one in jobs]
    good, bad = batch_outcomes(verify_batch, staged, {})
    assert good.converted is not None
    assert good.converted.manifest_uri == "/out/good.bin.manifest.json"
    assert (good.converted.tensors, good.converted.read_nbytes, good.converted.written_nbytes) == (2, 5, 4)
    assert (bad.kind, bad.reason) == ("failed", "verification_failed")


def test_storage_options_come_from_the_open_run(live: LiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = engine(monkeypatch, {})
    convert([job("a")])
    assert calls[0]["source"].store.storage_options == {"key": "source secret"}
    assert calls[0]["dest"].store.storage_options == {"key": "dest secret"}
    assert "secret" not in repr(calls[0]["source"])
    assert calls[0]["run_id"] == "r"


def test_without_its_run_a_task_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = engine(monkeypatch, {})
    with pytest.raises(LookupError, match="not open in this process"):
        convert([job("a")])
    assert calls == []


def test_a_run_that_is_being_stopped_interrupts_its_tasks(
    live: LiveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = engine(monkeypatch, {})
    live.stopping.set()
    assert [outcome.kind for outcome in convert([job("a"), job("b")])] == ["not_tried", "not_tried"]
    assert calls == []


def test_what_was_finished_before_the_stop_is_told(live: LiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(Listener):
        def moved(self, nbytes: int) -> None:
            if len(calls) == 1:
                live.stopping.set()

    calls = engine(monkeypatch, {})
    live.listener = Stops()
    assert [outcome.kind for outcome in convert([job("a"), job("b"), job("c")])] == [
        "staged", "staged", "not_tried",
    ]  # fmt: skip


def test_the_progress_callback_is_what_stops_the_engine() -> None:
    heard: list[int] = []

    class Hearing(Listener):
        def moved(self, nbytes: int) -> None:
            heard.append(nbytes)

    live = LiveRun("r", listener=Hearing())
    live.moved(5)
    live.stopping.set()
    with pytest.raises(Interrupted):
        live.moved(6)
    assert heard == [5]


def test_a_ticket_shows_no_storage_options_and_carries_them() -> None:
    ticket = Ticket("r3", Credentials.to_send(None, {"key": "secret"}), goes_out=True)
    assert "secret" not in repr(ticket)
    live = enter_run(pickle.loads(pickle.dumps(ticket)))
    assert live.source_options == {"key": "secret"}


def test_a_ticket_with_a_reference_carries_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = Ticket("r3", Credentials.to_send("env:OPTIONS_HERE", {"key": "of the flow"}), goes_out=True)
    assert b"of the flow" not in pickle.dumps(ticket)
    with pytest.raises(errors.UsageError, match="OPTIONS_HERE"):
        enter_run(ticket)
    monkeypatch.setenv("OPTIONS_HERE", '{"key": "of the worker"}')
    assert enter_run(ticket).source_options == {"key": "of the worker"}


def test_a_run_is_open_only_inside_its_context() -> None:
    live = LiveRun("r2")
    with open_live_run(live):
        assert find_live_run("r2") is live
    assert not is_open("r2")
    assert live.stopping.is_set()


def test_no_representation_shows_storage_options(live: LiveRun) -> None:
    assert "secret" not in repr(live)


def test_one_manifest_that_cannot_be_read_hides_no_other(
    live: LiveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify_outputs(place: Place, **keywords: Any) -> tuple[list[Any], dict[str, tuple[str, str]]]:
        if place.name == "a":
            raise errors.StorageError("reset", transient=True)
        if place.name == "b":
            raise KeyError("bug")
        return [], {}

    monkeypatch.setattr("ptbin.runs.verifying.verify_outputs", verify_outputs)
    a, b, c = batch_outcomes(verify_manifests, ["a", "b", "c"], {"level": "checksum"})
    assert (a.transient, a.reason) == (True, "storage_error")
    assert (b.transient, b.reason) == (False, "internal_error")
    assert (c.kind, c.issues) == ("proven", ())


def test_each_file_is_tried_where_the_backup_place_is_full(
    live: LiveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_file(*_: Any, **__: Any) -> None:
        raise errors.NoSpaceError("no space left")

    monkeypatch.setattr(mirroring, "copy_file", copy_file)
    values = {"dest": "memory://dest", "backup": "memory://backup"}
    outcomes = batch_outcomes(back_up_batch, [str(number) for number in range(5)], values)
    assert [outcome.kind for outcome in outcomes] == ["failed"] * 5, "one not tried would be written over"


def test_messages_are_one_bounded_line() -> None:
    assert one_line("a\nb\t c") == "a b c"
    assert len(one_line("x" * 10_000)) == 500
    assert "\n" not in outcome_of_error("p", ValueError("two\nlines")).detail


def test_nothing_is_cached_or_persisted_by_prefect() -> None:
    from prefect.cache_policies import NO_CACHE

    for task in (convert_batch, verify_batch, verify_manifests):
        assert task.cache_policy == NO_CACHE
        assert task.persist_result is False
        assert task.retries == 0  # a retry would redo what is finished; the flow retries the rest
    assert converting.__doc__
