"""Doing a tensor's opcodes in one step changes nothing: the machine without it is the yardstick."""

from __future__ import annotations

import io
import random
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ptbin
from ptbin.errors import PtbinError
from ptbin.options import Limits
from ptbin.reading.pickle import interpreter, tensor_runs
from ptbin.reading.pickle.interpreter import run_pickle
from ptbin.values.nodes import DictNode, Global, Instance


class _Never:
    def match(self, data: bytes, position: int) -> None:
        del data, position


def _pickle_of(values: Any) -> bytes:
    file = io.BytesIO()
    torch.save(values, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


def _values() -> dict[str, Any]:
    shared = torch.arange(24.0)
    values: dict[str, Any] = {f"t{i}": torch.full((i % 5, 2), 3) for i in range(90)}
    values |= {f"d{i}": torch.zeros([2] * i, dtype=torch.bfloat16) for i in range(7)}
    values |= {"a": shared[3:], "b": shared.view(4, 6).T, "grad": torch.zeros(2, requires_grad=True)}
    values |= {"ü": torch.zeros(3), "r" * 300: torch.zeros(3), "k\n": torch.zeros(3), "": torch.zeros(3)}
    values |= {"p": torch.nn.Parameter(torch.zeros(70000)), "n": {"x": torch.zeros(300, 2), "again": shared}}
    return values


def _said(node: Any, memo: dict[int, int] | None = None) -> Any:
    """A record as plain values; one that was met before is the number it had."""
    memo = {} if memo is None else memo
    if isinstance(node, Global):
        return node.path
    if isinstance(node, (DictNode, Instance, list)):
        if id(node) in memo:
            return f"#{memo[id(node)]}"
        memo[id(node)] = len(memo)
    if isinstance(node, DictNode):
        return [node.kind, [(_said(k, memo), _said(v, memo)) for k, v in node.pairs], _said(node.state, memo)]
    if isinstance(node, Instance):
        parts = (node.cls, node.args, node.kwargs, node.state, node.items, node.pairs)
        return ["instance", *(_said(part, memo) for part in parts)]
    if isinstance(node, (list, tuple)):
        return [type(node).__name__, *(_said(item, memo) for item in node)]
    return repr(node)


def _outcome(data: bytes, limits: Limits, monkeypatch: pytest.MonkeyPatch, run: Any) -> Any:
    """What the pickle says and does, without any reducer but torch's for mappings."""
    met: list[Any] = []

    def persistent(pid: Any) -> Any:
        met.append(_said(pid))
        return Instance("storage", pid)

    def ordered(args: tuple[Any, ...]) -> DictNode:
        met.append(_said(args))
        return DictNode("OrderedDict")

    monkeypatch.setattr(interpreter, "TENSOR_RUN", run)
    reducers = {("collections", "OrderedDict"): ordered}
    try:
        program = run_pickle(data, reducers=reducers, persistent=persistent, limits=limits)
    except PtbinError as error:
        return type(error), met
    calls = [_said(call) for call in program.calls]
    return (
        _said(program.root),
        program.end,
        program.opcodes,
        list(program.globals),
        program.oddities,
        calls,
        met,
    )


PICKLE = _pickle_of(_values())


def _assert_same(data: bytes, limits: Limits | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        by_runs = _outcome(data, limits or Limits(), patch, tensor_runs.TENSOR_RUN)
        one_by_one = _outcome(data, limits or Limits(), patch, _Never())
    assert by_runs == one_by_one


def test_the_runs_of_torch_are_found() -> None:
    """Else the rest of this module compares the machine with itself."""
    # All but the first ones of a kind, which bring names, and one that asks for a gradient.
    assert len(tensor_runs.TENSOR_RUN.findall(PICKLE)) >= 99
    # With their names, but for the first ones and for names that are not of printable ASCII.
    assert len(tensor_runs.NAMED_RUN.findall(PICKLE)) >= 55


def test_a_pickle_says_the_same() -> None:
    _assert_same(PICKLE)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_pickle_says_the_same(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(5):
        data = bytearray(PICKLE)
        for _ in range(chance.choice([1, 1, 2, 5])):
            data[chance.randrange(len(data))] = chance.choice(
                [0, 40, 41, 104, 113, 133, chance.randrange(256)]
            )
        _assert_same(bytes(data))
    _assert_same(PICKLE[: chance.randrange(len(PICKLE))])


@given(st.integers(1, 4000))
def test_the_limit_of_opcodes_is_the_same(opcodes: int) -> None:
    _assert_same(PICKLE, Limits(opcodes=opcodes))


@pytest.mark.thorough
def test_a_memo_that_holds_something_else_is_taken_at_its_word() -> None:
    """The expression looks at opcodes; what they name is the memo's business."""
    first = tensor_runs.TENSOR_RUN.search(PICKLE)
    assert first is not None
    for group in (1, 2, 3, 7, 15):
        for index in range(1, 12):
            data = bytearray(PICKLE)
            data[first.end(group) - 1] = index
            _assert_same(bytes(data))


def test_what_torch_saves_is_read_alike(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(_values(), tmp_path / "x.pt")
    found = ptbin.inspect(str(tmp_path / "x.pt"))
    monkeypatch.setattr(interpreter, "TENSOR_RUN", _Never())
    assert ptbin.inspect(str(tmp_path / "x.pt")) == found
