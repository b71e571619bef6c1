"""The rules for what is done to many, held by stages of toys: no server, no process."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prefect.states import Completed, Crashed, Failed

from flows import stages
from flows.access import Running
from flows.stages import LOST_TRIES, Stage, Stages, count_of
from ptbin.runs.outcomes import Outcome
from ptbin.runs.retrying import RETRIES

Do = Callable[[Any], Outcome]


class Task:
    """A batch task without Prefect: `do` for each item; what it raises ends the whole batch."""

    def __init__(self, do: Do) -> None:
        self.do = do
        self.batches: list[list[str]] = []
        self.names: list[str] = []

    def with_options(self, *, task_run_name: str) -> Task:
        self.names.append(task_run_name)
        return self


class Future:
    def __init__(self, state: Any) -> None:
        self.state = state

    def wait(self) -> None: ...

    def add_done_callback(self, heard: Callable[[Any], None]) -> None:
        heard(self)


class Runner:
    width = 2
    is_remote = True

    def submit(self, task: Task, *, ticket: Any, items: Sequence[Any], values: Mapping[str, Any]) -> Future:
        del ticket, values
        task.batches.append([item if isinstance(item, str) else item.path for item in items])
        try:
            return Future(Completed(data=[task.do(item) for item in items]))
        except ProcessLookupError as error:
            return Future(Crashed(message=str(error)))
        except RuntimeError as error:
            return Future(Failed(message=str(error)))


class Line:
    """Stages over that runner, and what they settled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stages, "retry_delay", lambda _: 0.001)
        self.stopping = threading.Event()
        live = SimpleNamespace(run_id="r", check=lambda: None, stopping=self.stopping, task_runs=0)
        run = SimpleNamespace(runner=Runner(), live=live, ticket=None, stop=self.stopping.set)
        run.is_stopping = False
        self.run = run
        self.stages = Stages(cast("Running", run), logging.getLogger("stages"))
        self.final: list[tuple[str, str, str]] = []

    def stage(self, do: Do, **settings: Any) -> Stage:
        task = cast("Any", Task(do))
        return Stage(task, "do", {}, self.settle, count_of("things"), **settings)

    def settle(self, final: Sequence[tuple[Any, Outcome]]) -> None:
        self.final += [(str(item), outcome.kind, outcome.reason) for item, outcome in final]

    def carry_out(self, stage: Stage, *batches: Sequence[str]) -> list[list[str]]:
        self.stages.carry_out((stage, batches))
        return cast("Task", stage.task).batches


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    return Line(monkeypatch)


def done(item: Any) -> Outcome:
    return Outcome(item if isinstance(item, str) else item.path, "converted")


def test_one_that_takes_its_process_along_fails_alone(line: Line) -> None:
    def do(item: str) -> Outcome:
        if item == "e":
            raise ProcessLookupError("gone")
        return done(item)

    batches = line.carry_out(line.stage(do), list("abcdefgh"))
    kinds = {item: (kind, reason) for item, kind, reason in line.final}
    assert kinds == dict.fromkeys("abcdfgh", ("converted", "")) | {"e": ("failed", "worker_lost")}
    assert len(line.final) == 8
    assert len([batch for batch in batches if batch == ["e"]]) <= LOST_TRIES


def test_what_is_not_to_be_halved_is_given_up_after_some_tries(line: Line) -> None:
    def do(item: str) -> Outcome:
        raise ProcessLookupError("gone")

    batches = line.carry_out(line.stage(do, splits=False), ["a", "b"])
    assert batches == [["a", "b"]] * (LOST_TRIES + 1)
    assert line.final == [("a", "failed", "worker_lost"), ("b", "failed", "worker_lost")]


def test_what_a_store_may_do_better_comes_back_by_itself_and_not_for_ever(line: Line) -> None:
    met: Counter[str] = Counter()

    def do(item: str) -> Outcome:
        met[item] += 1
        if item == "never" or (item == "once" and met[item] == 1):
            return Outcome(item, "failed", "storage_error", transient=True)
        return done(item)

    batches = line.carry_out(line.stage(do), ["fine", "once", "never"])
    assert batches[:2] == [["fine", "once", "never"], ["once", "never"]]
    assert met == {"fine": 1, "once": 2, "never": RETRIES + 1}
    assert {item: kind for item, kind, _ in line.final} == {
        "fine": "converted", "once": "converted", "never": "failed",
    }  # fmt: skip


def test_a_task_run_that_fails_fails_its_items_and_no_others(line: Line) -> None:
    def do(item: str) -> Outcome:
        if item == "b":
            raise RuntimeError("a fault of ours")
        return done(item)

    line.carry_out(line.stage(do), ["a", "b"], ["c"])
    assert sorted(line.final) == [
        ("a", "failed", "internal_error"), ("b", "failed", "internal_error"), ("c", "converted", ""),
    ]  # fmt: skip


def test_what_is_staged_goes_on_before_new_batches_begin(line: Line) -> None:
    order: list[str] = []

    def write(item: str) -> Outcome:
        order.append(f"write {item}")
        return Outcome(item, "staged", seconds=1.0) if item != "bad" else Outcome(item, "rejected", "unsafe")

    def prove(staged: Any) -> Outcome:
        order.append(f"prove {staged.path}")
        return Outcome(staged.path, "converted", seconds=2.0)

    line.run.runner.width = 1
    both = line.stage(write) >> line.stage(prove)
    line.carry_out(both, ["a", "bad"], ["b"])
    assert order == ["write a", "write bad", "prove a", "write b", "prove b"]
    assert sorted(line.final) == [
        ("a", "converted", ""),
        ("b", "converted", ""),
        ("bad", "rejected", "unsafe"),
    ]


def test_items_of_one_key_go_through_in_order(line: Line) -> None:
    """The first version of a model comes back later: its second one waits, another model does not."""
    met: Counter[str] = Counter()

    def transfer(item: str) -> Outcome:
        met[item] += 1
        if item == "m/1" and met[item] == 1:
            return Outcome(item, "failed", "storage_error", transient=True)
        return Outcome(item, "staged")

    items = [SimpleNamespace(path=path) for path in ("m/1", "m/2", "n/1", "n/2")]

    def of_model(item: Any) -> str:
        return str(item.path)[0]

    line.stages.expect(of_model, items)
    register = line.stage(done, splits=False, key=of_model)
    stage = line.stage(lambda item: transfer(item.path)) >> register
    line.stages.carry_out((stage, [items[:2], items[2:]]))
    registered = [path for batch in cast("Task", register.task).batches for path in batch]
    assert registered.index("m/1") < registered.index("m/2")
    assert registered.index("n/1") < registered.index("n/2")
    assert registered.index("n/2") < registered.index("m/1")
    assert len(registered) == 4


def test_a_version_that_is_refused_holds_up_nothing(line: Line) -> None:
    items = [SimpleNamespace(path=path) for path in ("m/1", "m/2")]
    line.stages.expect(lambda item: "m", items)

    def transfer(item: Any) -> Outcome:
        return (
            Outcome(item.path, "rejected", "unsafe") if item.path == "m/1" else Outcome(item.path, "staged")
        )

    register = line.stage(done, splits=False, key=lambda item: "m")
    line.stages.carry_out((line.stage(transfer) >> register, [items]))
    assert cast("Task", register.task).batches == [["m/2"]]


def test_a_run_that_is_being_stopped_accounts_for_what_it_did_not_try(line: Line) -> None:
    def do(item: str) -> Outcome:
        line.run.is_stopping = True
        raise ProcessLookupError("gone")

    line.carry_out(line.stage(do), ["a", "b"])
    assert line.final == [("a", "not_tried", ""), ("b", "not_tried", "")]


def test_braces_in_a_path_are_braces_in_the_name_of_its_task_run(line: Line) -> None:
    """Prefect fills names in by `str.format`."""
    stage = Stage(cast("Any", Task(done)), "do", {}, line.settle, lambda items: items[0])
    line.carry_out(stage, ["run{1}/{x}.ckpt"])
    (name,) = cast("Task", stage.task).names
    assert name.format() == "do run{1}/{x}.ckpt"
